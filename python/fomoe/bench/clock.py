# SPDX-License-Identifier: Apache-2.0
"""Where contenders run, and the clock that times them there."""

import time
from collections.abc import Callable
from typing import Any

import torch

from fomoe import _C
from fomoe.errors import UserError

DEVICES = ("cpu", "cuda")
_CACHES = 3  # what is read between two calls, in sizes of the L2 cache

Call = Callable[[], object]
Clock = Callable[[Call], float]


def require_device(name: str) -> torch.device:
    """The device of that name.

    Raises
    ------
    UserError
        When it is none of cpu and cuda, or there is no GPU, or a torch or fomoe without CUDA.
    """
    if name not in DEVICES:
        raise UserError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device: cuda: torch {torch.__version__} finds no GPU here")
        if not _C.compiled_with_cuda():
            raise UserError(
                "--device: cuda: this fomoe was built without CUDA, see `fomoe build-info`"
            )
    return torch.device(name)


def clock_of(device: torch.device) -> Clock:
    """Seconds that a call takes on the device."""
    return CudaClock(device) if device.type == "cuda" else seconds_of


def seconds_of(call: Call) -> float:
    """Seconds until ``call`` returns."""
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    del result  # freed only now, for all alike
    return seconds


class CudaClock:
    """Seconds between two events around a call, whose operands have left the L2 cache.

    Reading zeros evicts them: unlike writing, it leaves nothing to be written back meanwhile. The
    launches of the call are hidden behind it as far as they can be.
    """

    def __init__(self, device: torch.device) -> None:
        size = _CACHES * torch.cuda.get_device_properties(device).L2_cache_size
        self._zeros = torch.zeros(size // 4, dtype=torch.int32, device=device)
        event: Any = torch.cuda.Event
        self._begin, self._end = event(enable_timing=True), event(enable_timing=True)

    def __call__(self, call: Call) -> float:
        torch.cuda.synchronize()
        self._zeros.max()
        self._begin.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        del result
        return float(self._begin.elapsed_time(self._end)) / 1e3
