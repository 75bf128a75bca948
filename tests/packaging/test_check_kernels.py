# SPDX-License-Identifier: Apache-2.0
"""tools/check_kernels.py turns down machine code that is not what the kernels' sources mean."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "tools/check_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module
    spec.loader.exec_module(module)
    return module


def kernel(tool, name="kernel", *, architecture="sm_90a", stack_bytes=0, **instructions):
    counts = Counter({key.replace("_", "."): count for key, count in instructions.items()})
    return tool.Kernel(
        name, architecture, registers=32, stack_bytes=stack_bytes, instructions=counts
    )


def test_a_kernel_without_local_memory_is_fine(tool):
    assert tool.faults_of(kernel(tool, LDG=4, STG=4)) == []


def test_local_memory_is_a_fault_of_any_kernel_but_a_probe(tool):
    assert tool.faults_of(kernel(tool, stack_bytes=64, LDL=2)) == [
        "kernel (sm_90a): 64 bytes of stack or local memory",
        "kernel (sm_90a): 2 LDL (local memory)",
    ]
    assert tool.faults_of(kernel(tool, "probe_fences", stack_bytes=64, LDL=2)) == []


def test_wgmma_that_is_waited_for_one_by_one_is_serialised(tool):
    pipelined = {"HGMMA": 20, "WARPGROUP_ARRIVE": 5, "WARPGROUP_DEPBAR": 5}
    serialised = {"HGMMA": 20, "WARPGROUP_ARRIVE": 20, "WARPGROUP_DEPBAR": 20}
    assert tool.faults_of(kernel(tool, **pipelined)) == []
    (fault,) = tool.faults_of(kernel(tool, **serialised))
    assert "wgmma is serialised" in fault


def test_a_kernel_must_have_the_instructions_that_its_name_promises(tool, monkeypatch):
    promise = tool.Requirement(r"^sm80::", "sm_80", ("HMMA", "LDGSTS"))
    monkeypatch.setattr(tool, "REQUIREMENTS", (promise,))
    bad = kernel(tool, "sm80::product", architecture="sm_80", HMMA=3)
    assert tool.faults_of(bad) == ["sm80::product (sm_80): no LDGSTS"]
    assert tool.faults_of(kernel(tool, "permute", architecture="sm_80")) == []
    assert tool.unmet_requirements([bad]) == []
    (unmet,) = tool.unmet_requirements([kernel(tool, "permute", architecture="sm_80")])
    assert "no kernel for sm_80 matches '^sm80::'" in unmet


def test_ptxas_messages_and_spills_are_read_from_the_log(tool):
    log = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async serialized in '_Z1fv'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async serialized in '_Z1fv'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async serialized in '_Z5probev'
ptxas info    : Function properties for _Z1gv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z1hv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    message, spill = tool.faults_of_messages(log)
    assert "C7510" in message
    assert "_Z1f" in message
    assert spill == "_Z1gv: 12 bytes spill stores, 8 spill loads"


def test_instructions_are_counted_with_predicates_and_without_operands(tool):
    usage = """\
arch = sm_90a
 Function _Z1fv:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:916
"""
    sass = """\
	code for sm_90a
		Function : _Z1fv
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
        /*0010*/              @!UP0 UTMALDG.2D [UR8], [UR4] ;  /* 0x00000004080075b4 */
        /*0020*/                   WARPGROUP.ARRIVE ;          /* 0x0000000000007941 */
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/               @P3 BRA 0x20 ;
"""
    kernels = tool.read_usage(usage)
    tool.read_instructions(sass, kernels)
    (kernel,) = kernels.values()
    assert (kernel.registers, kernel.stack_bytes, kernel.shared_bytes) == (168, 0, 1024)
    assert kernel.highest_register == 24
    counted = {"LDC", "UTMALDG", "WARPGROUP", "WARPGROUP.ARRIVE", "HGMMA", "BRA"}
    assert kernel.instructions == dict.fromkeys(counted, 1)


def test_names_are_told_without_namespaces_and_parameters(tool):
    name = "void fomoe::cuda::(anonymous namespace)::copy<4, fomoe::BFloat16>(float const*)"
    assert tool.short_name(name) == "copy<4, BFloat16>"
    assert tool.short_name("fomoe::cuda::sm90::f(int (*)(int))") == "sm90::f"


SPILLING = """
__global__ void __launch_bounds__(1024) {name}(float* x, int n) {{
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i * 1024 + threadIdx.x];
  for (int i = 0; i < n; ++i) local[(i * 7) % 64] += local[i % 64];
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = local[i];
}}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_kernel_compiled_with_local_memory_ends_the_check(tool, tmp_path):
    try:
        tool.find_tools()
    except SystemExit as error:
        pytest.skip(str(error))
    source = tmp_path / "kernels.cu"
    source.write_text(SPILLING.format(name="local") + SPILLING.format(name="probe_local"))
    flags = ["-std=c++20", "-Xptxas=-v", "-gencode=arch=compute_80,code=sm_80"]
    command = ["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    subprocess.run([str(ROOT / "cmake/keep_messages.sh"), *command], check=True)
    entry = {"file": str(source), "output": "kernels.o", "command": " ".join(command)}
    (tmp_path / "compile_commands.json").write_text(json.dumps([entry]))
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_kernels.py"), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "probe_local" in run.stdout
    assert "local (sm_80): 256 bytes of stack or local memory" in run.stderr
    assert "probe_local" not in run.stderr
