# SPDX-License-Identifier: Apache-2.0
"""What this installation was built with and what it finds on this machine."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

import fomoe._C as _C


def source_commit() -> str:
    """The commit this code is from: git's answer for a checkout, else the one it was built from."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
        with suppress(OSError, subprocess.SubprocessError):  # no git, or one that does not answer
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
            return run.stdout.strip()
    return _C.commit


def build_info() -> dict[str, str]:
    """Facts about the binary and the machine, as printable text by name."""
    if _C.compiled_with_cuda():
        cuda = f"compiled with CUDA {_C.cuda_version}, {_C.cuda_device_count()} devices usable"
    else:
        cuda = "not compiled (no nvcc at build time, or FOMOE_CUDA=OFF)"
    return {
        "fomoe": f"{version('fomoe')}, commit {source_commit()}, built from {_C.commit}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built against {_C.torch_version}, stable ABI 2.11)",
        "compiler": _C.compiler,
        "CPU kernels": f"{_C.cpu_capability()}, OpenMP {'on' if _C.openmp else 'off'}, "
        f"{torch.get_num_threads()} threads",
        "CUDA kernels": cuda,
        "ops": ", ".join(_registered_ops()),
    }


def show_build() -> None:
    """Print :func:`build_info`, one fact a line."""
    for name, fact in build_info().items():
        print(f"{name:<13} {fact}")


def _registered_ops() -> list[str]:
    names = {
        name.removeprefix("fomoe::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fomoe::")
    }
    return sorted(names)
