# SPDX-License-Identifier: Apache-2.0
"""A cache of transformers, and padding on either side, as a decoder's layers want to see them.

B sequences, S new tokens, G key/value heads, N head width, L positions with those of the cache.
"""

from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache

__all__ = ["PaddedStep"]


class PaddedStep:
    """What of a call of S tokens goes where; takes the place of fomoe.models.cache.CacheStep.

    Parameters
    ----------
    tokens_BS : Tensor, (B, S), int64
    mask_BL : Tensor, (B, L), optional
        0 for padding, on the left or on the right. None: there is none.
    cache : DynamicCache, optional
        Keys and values of earlier calls, to which those of this one are added.

    Raises
    ------
    ValueError
        The mask has another length than the tokens with those of the cache, or the cache is of
        another kind.
    """

    def __init__(
        self, tokens_BS: Tensor, mask_BL: Tensor | None, cache: DynamicCache | None
    ) -> None:
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"past_key_values: expected a DynamicCache, got {type(cache).__name__}"
            )
        batch_size, self.num_tokens = tokens_BS.shape
        self.cache = cache
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.num_visible = self.past + self.num_tokens
        if mask_BL is None:
            mask_BL = tokens_BS.new_ones(batch_size, self.num_visible)
        if mask_BL.shape != (batch_size, self.num_visible):
            raise ValueError(
                f"attention_mask: expected shape {(batch_size, self.num_visible)}, that of the "
                f"tokens and the cache, got {tuple(mask_BL.shape)}"
            )
        self.is_token_BL = mask_BL.bool()
        # A sequence's positions begin with its first token. Padding has some position, too.
        self.positions_BS = (self.is_token_BL.cumsum(1) - 1).clamp(min=0)[:, self.past :]
        self._masks: dict[int, Tensor] = {}

    def layer(self, index: int) -> "PaddedLayerStep":
        return PaddedLayerStep(self, index)

    @cached_property
    def _distance_SL(self) -> Tensor:
        """From a new token back to every position."""
        entry_L = torch.arange(self.num_visible, device=self.positions_BS.device)
        return entry_L[self.past :, None] - entry_L

    def mask(self, sliding_window: int) -> Tensor:
        """What a new token sees, (B, 1, S, L) bool: at least itself, padding nothing else."""
        if sliding_window not in self._masks:
            seen_SL = self._distance_SL >= 0
            if sliding_window > 0:
                seen_SL = seen_SL & (self._distance_SL < sliding_window)
            seen_BSL = seen_SL & self.is_token_BL[:, None] | (self._distance_SL == 0)
            self._masks[sliding_window] = seen_BSL[:, None]
        return self._masks[sliding_window]


class PaddedLayerStep:
    """One layer's part of a step."""

    def __init__(self, step: PaddedStep, index: int) -> None:
        self._step, self._index = step, index

    def extend(self, k_BGSN: Tensor, v_BGSN: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values, if there is a cache; returns all, (B, G, L, N) each."""
        if self._step.cache is None:
            return k_BGSN, v_BGSN
        k_BGLN, v_BGLN = self._step.cache.update(k_BGSN, v_BGSN, self._index)
        return k_BGLN, v_BGLN

    def mask(self, sliding_window: int) -> Tensor:
        return self._step.mask(sliding_window)
