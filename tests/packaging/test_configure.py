# SPDX-License-Identifier: Apache-2.0
"""What a build says when something it needs is missing: one sentence with the remedy."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def configure(folder, *options):
    """The error text of `cmake` with these options, white space folded."""
    run = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options],
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    return re.sub(r"\s+", " ", run.stderr)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def test_without_torch_the_build_says_to_install_it_first(bare_python, tmp_path):
    error = configure(tmp_path, f"-DPython_EXECUTABLE={bare_python}", "-DFOMOE_CUDA=OFF")
    assert "torch was not found; install torch >= 2.11 first" in error


def test_a_torch_that_is_too_old_is_named(tmp_path):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.10.0+cpu'\n")
    error = configure(tmp_path / "build", f"-DFOMOE_TORCH_DIR={torch}", "-DFOMOE_CUDA=OFF")
    assert "torch 2.10.0+cpu was found; fomoe needs torch >= 2.11" in error


def test_cuda_asked_for_without_a_compiler_is_refused(tmp_path):
    options = ("-DFOMOE_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND", "-DFOMOE_BUILD_PYTHON=OFF")
    error = configure(tmp_path, *options)
    assert "FOMOE_CUDA=ON, but no CUDA compiler (nvcc) was found" in error
