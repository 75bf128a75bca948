# SPDX-License-Identifier: Apache-2.0
"""How much memory a site uses, and for what."""

import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["memory_by_class", "peak_rss", "tensor_bytes"]


def tensor_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages behind the tensors, each counted once, but none of ``besides``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for tensor in besides:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def memory_by_class(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: Mapping[str, Tensor],
) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer moments and the values the round started from."""
    parameters = list(model.parameters())
    moments = [
        value
        for parameter in parameters
        for value in _values(optimizer.state.get(parameter))
        if isinstance(value, Tensor)
    ]
    return {
        "parameters": tensor_bytes(parameters),
        "gradients": tensor_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": tensor_bytes(moments),
        "round_start": tensor_bytes(start.values()),
    }


def _values(state: Mapping[str, Any] | None) -> Iterable[Any]:
    return () if state is None else state.values()


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
