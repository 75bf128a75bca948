# SPDX-License-Identifier: Apache-2.0
"""What the machine is and what it can do at most, measured the moment before."""

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fomoe import _C
from fomoe._build import source_commit
from fomoe.bench.timing import seconds_of

_SIDE = 1024  # large enough for torch.mm's full rate, here
GEMM_FLOPS = 2 * _SIDE**3
_COPY_BYTES = 2**28
_TRIES = 20

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def machine(dtypes: Sequence[str], threads: int) -> dict[str, Any]:
    """Facts and ceilings, as JSON-able values."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],  # of others: nothing has run yet
        "fomoe_cpu_kernels": _C.cpu_capability(),
        "gemm_gflops": {dtype: gemm_gflops(DTYPES[dtype]) for dtype in dtypes},
        "copy_gbytes_per_second": copy_gbytes_per_second(),
    }


def versions() -> dict[str, str | None]:
    """Of what is measured; transformers may be missing."""
    return {
        "fomoe": version("fomoe"),
        "commit": source_commit(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }


def gemm(dtype: torch.dtype) -> Callable[[], object]:
    """A torch.mm of GEMM_FLOPS on random matrices."""
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def gemm_gflops(dtype: torch.dtype) -> float:
    """Best rate of :func:`gemm`."""
    call = gemm(dtype)
    return GEMM_FLOPS / min(seconds_of(call) for _ in range(_TRIES)) / 1e9


def copy_gbytes_per_second() -> float:
    """Best rate of a copy that fits no cache; bytes read and bytes written both count."""
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source)) for _ in range(_TRIES))
    return 2 * _COPY_BYTES / seconds / 1e9


def _cpu_name() -> str:
    with suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
