# SPDX-License-Identifier: Apache-2.0
"""The NCCL transport from Python, on a machine without a GPU: what it refuses, and how.

That bytes arrive is tested in C++ over a fake NCCL, and in tools/gpu_check.py on a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch

from fomoe import _C
from fomoe.comm import Topology
from fomoe.comm.nccl import STAGES, NcclTransport

FAKE = """
#include <cstring>
extern "C" {
int ncclGetVersion(int* version) { *version = VERSION; return 0; }
int ncclGetUniqueId(char* id) { std::memset(id, 7, 128); return 0; }
"""
OTHERS = """
GetErrorString GetLastError CommInitRankConfig CommSplit CommGetAsyncError CommFinalize CommDestroy
CommAbort GroupStart GroupEnd Send Recv AllGather
""".split()  # noqa: SIM905
MISSING = r"NCCL: expected a library to load, got: libnccl\.so\.2: cannot open shared object file"


def library(folder, version):
    """A libnccl.so.2 with all functions, of which two do something."""
    source = folder / "nccl.cpp"
    stubs = "".join(f"int nccl{name}() {{ return 5; }}\n" for name in OTHERS)
    source.write_text(FAKE.replace("VERSION", str(version)) + stubs + "}\n")
    command = ["c++", "-shared", "-fPIC", "-o", str(folder / "libnccl.so.2"), str(source)]
    subprocess.run(command, check=True)
    return folder


def output_of(code, folder):
    """What a process says that finds libnccl.so.2 in a folder; which one is open is for good."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    imports = "from fomoe.comm.nccl import NcclTransport, Topology\n"
    return subprocess.run(
        [sys.executable, "-c", imports + code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


NO_CUDA = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None,
    reason="torch brings an NCCL of its own, or none can be had",
)


@NO_CUDA
def test_a_machine_without_nccl_is_told_so():
    with pytest.raises(RuntimeError, match=MISSING):
        NcclTransport.unique_id()
    with pytest.raises(RuntimeError, match=MISSING):
        NcclTransport(Topology([1, 1]), 0, bytes(128), 1.0)


@NO_CUDA
def test_an_old_nccl_is_named_with_the_version_needed(tmp_path):
    run = output_of("NcclTransport.unique_id()", library(tmp_path, 21701))
    assert "NCCL: expected version 2.18.0 or newer, got 2.17.1" in run.stderr


@NO_CUDA
def test_without_a_driver_or_a_build_for_it_the_error_says_so(tmp_path):
    code = "print(NcclTransport.unique_id()); NcclTransport(Topology([1, 1]), 0, bytes(128), 1.0)"
    run = output_of(code, library(tmp_path, 22809))
    assert run.stdout.strip() == str(bytes([7] * 128))
    reason = (
        "NCCL: expected a CUDA device and its driver on this machine, got: "
        if _C.compiled_with_cuda()
        else "NCCL: this build of fomoe has no CUDA; install it again with nvcc on PATH"
    )
    assert reason in run.stderr


def test_a_communicator_that_does_not_exist_is_refused():
    ops, counts = torch.ops.fomoe_nccl, torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: ops.gather_counts(99, counts),
        lambda: ops.all_to_all(99, 0, torch.empty(0, dtype=torch.uint8), [0], [0]),
        lambda: ops.group(99, 0),
        lambda: ops.check(99),
        lambda: ops.abort(99),
        lambda: ops.destroy(99),
    ):
        with pytest.raises(RuntimeError, match="communicator must be one that create returned"):
            call()


def test_a_timeout_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds, got 0"):
        NcclTransport(Topology([1, 1]), 0, bytes(128), 0)


def test_no_schema_has_a_string():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fomoe_nccl::")]
    assert len(names) == 9
    for name in names:
        schema = getattr(torch.ops.fomoe_nccl, name.split("::")[1]).default._schema
        assert [a.name for a in schema.arguments if "str" in str(a.type)] == []


def test_the_codes_of_the_stages_are_those_of_the_contract():
    assert STAGES == {"intra_node": 0, "inter_site": 1}
