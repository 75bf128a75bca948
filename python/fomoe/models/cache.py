# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens that sequences have had, so that only new ones are computed.

Every sequence keeps its entries at its own positions, from 0 on, whatever the others' lengths: it
gets the same numbers alone and in a batch (our choice; padding on the left would shift positions).

B sequences, S new tokens of the longest, G key/value heads, N head width, L visible positions.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CacheStep", "KeyValueCache", "LayerStep", "LayerView", "StepView"]


class LayerView(Protocol):
    """What a layer's attention asks of a cache."""

    def extend(self, k_BGSN: Tensor, v_BGSN: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values; returns all that are visible, (B, G, L, N) each."""
        ...

    def mask(self, sliding_window: int) -> Tensor:
        """Which of them a new token sees, (B, 1, S, L) bool."""
        ...


class StepView(Protocol):
    """What a model asks of a cache for a call of S tokens; :class:`CacheStep` is ours."""

    num_visible: int
    """L: how many positions there are with those of this call."""
    positions_BS: Tensor
    """(B, S) int64: that of every new token in its sequence."""

    def layer(self, index: int) -> LayerView: ...


class KeyValueCache:
    """Preallocated memory for B sequences of at most ``capacity`` tokens.

    2 * layers * B * G * (capacity + 1) * N elements, where the last position takes what padding
    writes.

    Parameters
    ----------
    num_layers, batch_size, num_kv_heads, capacity, head_dim : int
    dtype : torch.dtype
        Of the keys and values: the weights' dtype, or the autocast dtype.
    device : torch.device
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch_size
        """Tokens of every sequence so far."""
        shape = (num_layers, 2, batch_size, num_kv_heads, capacity + 1, head_dim)
        # Zeros, for attention multiplies what it does not see by 0.
        self.entries = torch.zeros(shape, dtype=dtype, device=device)

    def step(self, counts: Sequence[int]) -> "CacheStep":
        """Make room for ``counts[b]`` more tokens of sequence b, which may be none.

        The model's next call brings them, (B, S) with S at least 1 and the largest count; what is
        beyond a sequence's count is padding.

        Raises
        ------
        ValueError
            As :meth:`extend`.
        """
        begins, device = self.extend(counts), self.entries.device
        begin_B1 = torch.tensor(begins, device=device, dtype=torch.int64)[:, None]
        count_B1 = torch.tensor(counts, device=device, dtype=torch.int64)[:, None]
        offset_S = torch.arange(max(1, *counts) if counts else 1, device=device)
        is_token_BS = offset_S < count_B1
        # Padding has position 0, from where it sees something: its results are finite.
        positions_BS = torch.where(is_token_BS, begin_B1 + offset_S, 0)
        entries_BS = torch.where(is_token_BS, positions_BS, self.capacity)
        num_visible = max(1, *self.lengths) if counts else 1
        return CacheStep(self, positions_BS, entries_BS, num_visible)

    def extend(self, counts: Sequence[int]) -> list[int]:
        """Count ``counts[b]`` more tokens of sequence b; returns the lengths before.

        Raises
        ------
        ValueError
            If there is not one count per sequence, or a sequence would get longer than the
            capacity.
        """
        if len(counts) != len(self.lengths):
            raise ValueError(f"counts: expected {len(self.lengths)}, got {len(counts)}")
        lengths = [old + new for old, new in zip(self.lengths, counts, strict=True)]
        if max(lengths, default=0) > self.capacity:
            raise ValueError(
                f"counts: expected at most {self.capacity} tokens in a sequence, got {max(lengths)}"
            )
        begins, self.lengths = self.lengths, lengths
        return begins


class CacheStep:
    """Where the tokens of one call go, and what they see.

    Parameters
    ----------
    cache : KeyValueCache
    positions_BS, entries_BS : Tensor, (B, S), int64
        That of every new token in its sequence, and where it goes in the cache: padding to
        position 0 and entry ``capacity``.
    num_visible : int
        L, at least the length of the longest sequence with its new tokens.
    """

    def __init__(
        self, cache: KeyValueCache, positions_BS: Tensor, entries_BS: Tensor, num_visible: int
    ) -> None:
        self.cache = cache
        self.positions_BS, self._entries_BS = positions_BS, entries_BS
        self.num_tokens, self.num_visible = positions_BS.shape[1], num_visible
        self._masks: dict[int, Tensor] = {}

    def layer(self, index: int) -> "LayerStep":
        return LayerStep(self, self.cache.entries[index])

    @cached_property
    def _sequence_B1(self) -> Tensor:
        return torch.arange(len(self.cache.lengths), device=self.cache.entries.device)[:, None]

    def mask(self, sliding_window: int) -> Tensor:
        """Which entries a new token sees, (B, 1, S, L) bool; the same for all layers alike."""
        if sliding_window not in self._masks:
            entry_L = torch.arange(self.num_visible, device=self.positions_BS.device)
            position_BS1 = self.positions_BS[:, :, None]
            seen_BSL = entry_L <= position_BS1
            if sliding_window > 0:
                seen_BSL &= entry_L > position_BS1 - sliding_window
            self._masks[sliding_window] = seen_BSL[:, None]
        return self._masks[sliding_window]


class LayerStep:
    """One layer's part of a step."""

    def __init__(self, step: CacheStep, entries: Tensor) -> None:
        self._step = step
        self._keys, self._values = entries

    def extend(self, k_BGSN: Tensor, v_BGSN: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values; returns all that are visible, (B, G, L, N) each."""
        step = self._step
        at = (step._sequence_B1, slice(None), step._entries_BS)
        self._keys[at] = k_BGSN.transpose(1, 2)
        self._values[at] = v_BGSN.transpose(1, 2)
        visible = slice(0, step.num_visible)
        return self._keys[:, :, visible], self._values[:, :, visible]

    def mask(self, sliding_window: int) -> Tensor:
        return self._step.mask(sliding_window)
