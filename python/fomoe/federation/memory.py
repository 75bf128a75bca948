# SPDX-License-Identifier: Apache-2.0
"""How much memory tensors and processes use."""

import resource
import sys
from collections.abc import Iterable

from torch import Tensor

__all__ = ["peak_rss", "tensor_bytes"]


def tensor_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages behind the tensors, each counted once, but none of ``besides``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for tensor in besides:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
