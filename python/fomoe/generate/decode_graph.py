# SPDX-License-Identifier: Apache-2.0
"""Decode by graphs: what a step of one token per sequence launches, captured once and replayed.

A step of few tokens is over sooner than Python can launch its kernels one by one. A graph is
launched at once, but has fixed shapes and addresses: inputs are written where the captured kernels
read them, and attention covers a whole number of blocks of the cache, each number with a graph of
its own.

B sequences, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fomoe.models.cache import CacheStep, KeyValueCache

__all__ = ["Capture", "DecodeGraphs", "Model", "cuda_graphs"]

_BLOCK = 256
"""Positions of the cache by which attention grows, our choice."""
_WARM_UP = 2

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From what is to be captured to its replay, which gives the same tensor each time, overwritten."""


class Model(Protocol):
    """What generation needs of a model, as :class:`fomoe.models.Decoder` has it."""

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache: ...

    def hidden(self, tokens_BS: Tensor, cache: CacheStep | None = None) -> Tensor: ...

    def unembed(self, x: Tensor) -> Tensor: ...


class DecodeGraphs:
    """Of one model and one cache.

    Parameters
    ----------
    model : Model
        On one device, whose forward reads nothing back.
    cache : KeyValueCache
        Of at least one sequence.
    capture : Capture
    block : int
        Of the cache's positions, by which the captured steps differ.
    """

    def __init__(
        self, model: Model, cache: KeyValueCache, capture: Capture, block: int = _BLOCK
    ) -> None:
        self.model, self.cache, self._capture, self._block = model, cache, capture, block
        device, batch_size = cache.entries.device, len(cache.lengths)
        # Tokens, their positions, and where they go in the cache.
        self._inputs_3B1 = torch.zeros(3, batch_size, 1, dtype=torch.int64, device=device)
        self._replays: dict[int, Callable[[], Tensor]] = {}

    def __call__(self, tokens: Sequence[int | None]) -> Tensor:
        """Logits (B, V), until the next call, after a token of each sequence that has one.

        Raises
        ------
        ValueError
            As :meth:`KeyValueCache.extend`.
        """
        begins = self.cache.extend([int(token is not None) for token in tokens])
        padding = (0, 0, self.cache.capacity)
        inputs = [
            padding if token is None else (token, begin, begin)
            for token, begin in zip(tokens, begins, strict=True)
        ]
        self._inputs_3B1.copy_(torch.tensor(inputs).T[:, :, None])
        blocks = -(-max(self.cache.lengths) // self._block)
        num_visible = min(max(blocks, 1) * self._block, self.cache.capacity)
        if num_visible not in self._replays:
            self._replays[num_visible] = self._capture(lambda: self._step(num_visible))
        return self._replays[num_visible]()

    def _step(self, num_visible: int) -> Tensor:
        tokens_B1, positions_B1, entries_B1 = self._inputs_3B1
        step = CacheStep(self.cache, positions_B1, entries_B1, num_visible)
        return self.model.unembed(self.model.hidden(tokens_B1, step)[:, 0])


def cuda_graphs(device: torch.device) -> Capture:
    """Capture as CUDA graphs, which share their memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries allocate on their first call
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=stream):
            logits_BV = step()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay

    return capture
