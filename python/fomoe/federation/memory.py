# SPDX-License-Identifier: Apache-2.0
"""How much memory tensors and processes use."""

import mmap
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["host_buffer", "peak_rss", "tensor_bytes"]

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


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
