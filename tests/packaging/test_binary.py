# SPDX-License-Identifier: Apache-2.0
"""What the compiled files need, export and tell: they must load in any torch on any machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fomoe import _C

PACKAGE = Path(_C.__file__).parent
OP_LIBRARY = PACKAGE / "libfomoe_torch.so"
BINARIES = [OP_LIBRARY, Path(_C.__file__)]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("nm") is None or shutil.which("readelf") is None,
    reason="needs ELF binaries, and nm and readelf from binutils",
)


def lines_of(*command):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def dynamic_entries(binary, kind):
    """Values of the dynamic section, as in ``0x01 (NEEDED)  Shared library: [libm.so.6]``."""
    entries = [line for line in lines_of("readelf", "-dW", binary) if f"({kind})" in line]
    return [line.split("[")[1].rstrip("]") for line in entries]


def test_the_op_library_uses_torch_through_c_functions_only():
    undefined = [
        line.split(maxsplit=1)[1] for line in lines_of("nm", "-DC", "--undefined-only", OP_LIBRARY)
    ]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    mangled = [name for name in undefined if any(s in name for s in ("at::", "c10::", "torch::"))]
    assert mangled == []


def test_the_op_library_exports_no_function_of_its_own():
    exported = lines_of("nm", "-DC", "--defined-only", OP_LIBRARY)
    assert [line for line in exported if "fomoe::" in line] == []


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.name)
def test_nothing_that_comes_with_a_gpu_is_needed_to_load(binary):
    needed = dynamic_entries(binary, "NEEDED")
    assert "libc.so.6" in needed
    gpu = ("libcuda", "libcudart", "libnccl", "libcublas", "libtorch_cuda", "libc10_cuda")
    assert [name for name in needed if name.startswith(gpu)] == []


def test_libraries_are_found_beside_the_module_or_already_loaded():
    assert dynamic_entries(OP_LIBRARY, "RUNPATH") + dynamic_entries(OP_LIBRARY, "RPATH") == []
    assert dynamic_entries(Path(_C.__file__), "RUNPATH") == ["$ORIGIN"]


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.name)
def test_no_path_of_the_building_machine_is_inside(binary):
    content = binary.read_bytes()
    here = (Path(__file__).parents[2], Path(torch.__file__).parent, PACKAGE)
    assert [str(path) for path in here if str(path).encode() in content] == []
