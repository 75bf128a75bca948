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
from fomoe.bench.clock import clock_of

_SIDES = {"cpu": 1024, "cuda": 8192}  # large enough for torch.mm's full rate
_COPY_BYTES = 2**28  # more than any cache
_TRIES = 20

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def gemm_flops(device: torch.device) -> int:
    """Of one product of :func:`gemm`."""
    return 2 * _SIDES[device.type] ** 3


def machine(dtypes: Sequence[str], threads: int, device: torch.device) -> dict[str, Any]:
    """Facts and ceilings, as JSON-able values."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],  # of others: nothing has run yet
        "fomoe_cpu_kernels": _C.cpu_capability(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "gemm_gflops": {dtype: gemm_gflops(DTYPES[dtype], device) for dtype in dtypes},
        "copy_gbytes_per_second": copy_gbytes_per_second(device),
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


def gemm(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A torch.mm of :func:`gemm_flops` on random matrices."""
    side = _SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def gemm_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Best rate of :func:`gemm`."""
    call, clock = gemm(dtype, device), clock_of(device)
    return gemm_flops(device) / min(clock(call) for _ in range(_TRIES)) / 1e9


def copy_gbytes_per_second(device: torch.device) -> float:
    """Best rate of a copy that fits no cache; bytes read and bytes written both count."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target, clock = torch.empty_like(source), clock_of(device)
    seconds = min(clock(lambda: target.copy_(source)) for _ in range(_TRIES))
    return 2 * _COPY_BYTES / seconds / 1e9


def _gpu(device: torch.device) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_gib": about.total_memory / 2**30,
        "l2_mib": about.L2_cache_size / 2**20,
        "multiprocessors": about.multi_processor_count,
    }


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
