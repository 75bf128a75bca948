# SPDX-License-Identifier: Apache-2.0
"""How much memory tensors and processes use."""

import mmap
import resource
import sys
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scratch", "host_buffer", "peak_rss", "tensor_bytes"]

_WORTH_HUGE_PAGES = 2**22


def host_buffer(num_bytes: int) -> Tensor:
    """Uninitialised uint8 (num_bytes,) in host memory, from the system and given back to it.

    A large one is made of huge pages where the system has them: mapping fresh memory in small
    ones takes longer than filling it.
    """
    if num_bytes < _WORTH_HUGE_PAGES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Scratch:
    """Bytes of tensors that live for a while only, and the most there ever were at once.

    What :meth:`track` is told of counts until its storage, views included, is freed, or until
    :meth:`settle`, from which on what still lives is somebody's lasting state.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._alive: dict[int, tuple[int, weakref.finalize[..., Any]]] = {}
        self._bytes = 0

    def track(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage, once; returns the tensor."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._alive:
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            ended = weakref.finalize(storage, self._freed, id(storage))
            ended.atexit = False
            self._alive[id(storage)] = storage.nbytes(), ended
        return tensor

    def settle(self) -> None:
        """Stop counting what is alive."""
        for _, ended in self._alive.values():
            ended.detach()
        self._alive, self._bytes = {}, 0

    def _freed(self, key: int) -> None:
        num_bytes, _ = self._alive.pop(key)
        self._bytes -= num_bytes


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
