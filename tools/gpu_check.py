# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: everything that only a GPU can tell, in one command of at most 8 minutes.

    python tools/gpu_check.py [--minutes 8] [--only STEP]... [--output FOLDER] [--dry-run]

Builds for this machine, then probes what the emulation of the kernels assumes about the hardware,
then tests, looks for wrong accesses and races, and measures; results come in that order, so that
little time shows first whether the kernels are right. Needs nvcc, a CUDA build of torch and, in the
same environment, scikit-build-core, pybind11, cmake, ninja and pytest; no network.

The results are in build/gpu-check: results.json, a log per step, the measurements as JSON lines.
With --output, or the environment variable OUT, they are also gathered there in four files.
Exit status 1 if a step failed or was stopped at its limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from steps import Runner, Step, table, write_atomically

ROOT = Path(__file__).parents[1]
FOLDER = Path("build/gpu-check")  # commands run in ROOT
CPP = FOLDER / "cpp"  # build folder of the C++ tests and benchmarks
SITE = FOLDER / "site"  # where the package is installed
# The shapes of the targets in docs/benchmarks.md.
BENCHES = {
    "topk_gate": "--shape qwen3-30b --shape qwen3-next",
    "permute": "--shape qwen3-30b --shape olmoe",
    "grouped_gemm": "--shape qwen3-30b --shape olmoe --shape deepseek-v3-slice --dtype bf16",
    "expert_mlp": "--shape qwen3-30b --shape sonicmoe-7b-n256 --dtype bf16",
}
LAYERS = "--shape 32768,2048,768,128,8 --shape 24576,1536,256,128,8 --dtype bf16"


# ---- The steps -------------------------------------------------------------------------------
def stages() -> list[list[Step]]:
    """The steps of a stage run side by side."""
    python = sys.executable
    environment = {"PYTHONPATH": str(ROOT / SITE), "PYTHONUNBUFFERED": "1"}
    cpp = {"uses": ("build c++",)}
    return [
        [Step("machine", [python, "tools/gpu_check.py", "--machine"], 60)],
        [
            Step("build python", _shell(_install(python)), 240, ("machine",)),
            Step("build c++", _shell(_build_cpp()), 240, ("machine",)),
        ],
        [Step("probes", [str(CPP / "tests/cpp/cuda/probe_hopper")], 30, **cpp)],
        [Step("c++ tests", _ctest(), 60, **cpp)],
        [Step("package", [python, "-c", _IMPORT], 60, ("build python",), environment=environment)],
        [Step("pytest", _pytest(python), 120, ("package",), environment=environment)],
        [Step(tool, _shell(_sanitize(tool)), 75, **cpp) for tool in _SANITIZERS],
        *([_bench(name)] for name in BENCHES),
        [
            Step(
                "bench layer",
                _bench_layer(python),
                60,
                ("package",),
                environment=environment,
                may_be_cut=True,
            )
        ],
    ]


_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_IMPORT = (
    "import fomoe; from fomoe import _C; fomoe.show_build(); "
    "assert _C.compiled_with_cuda(), 'the package was built without CUDA kernels'"
)


def _shell(script: str) -> list[str]:
    return ["bash", "-ec", script]


def _install(python: str) -> str:
    return (
        f"{python} -m pip install --no-build-isolation --no-deps --upgrade --target {SITE} ."
        f" -Cbuild-dir={FOLDER}/python -Ccmake.define.FOMOE_CUDA=ON"
    )


def _build_cpp() -> str:
    # -k 0: what does not compile does not keep the rest from being built and run.
    options = "-DFOMOE_BUILD_PYTHON=OFF -DFOMOE_BUILD_TESTS=ON -DFOMOE_BUILD_BENCH=ON"
    return (
        f"cmake -S . -B {CPP} -G Ninja {options} -DFOMOE_CUDA=ON -DFOMOE_TEST_ON_GPU=ON"
        f" -DFOMOE_SANITIZE=OFF -DCMAKE_BUILD_TYPE=Release; cmake --build {CPP} -- -k 0"
    )


def _ctest() -> list[str]:
    folder = str(CPP / "tests/cpp/cuda")
    return ["ctest", "--test-dir", folder, "--output-on-failure", "-E", "probe_hopper"]


def _pytest(python: str) -> list[str]:
    options = ["-q", "-rs", "--durations=10", "-p", "no:cacheprovider"]
    return [python, "-m", "pytest", *options, "tests/cuda"]


def _sanitize(tool: str) -> str:
    command = f"compute-sanitizer --tool {tool} --error-exitcode 9 $test"
    return (
        f"bad=; for test in $(find {CPP}/tests/cpp/cuda -name 'test_*' -type f -executable); do"
        f' echo "== $test"; {command} || bad="$bad $(basename $test)"; done;'
        ' [ -z "$bad" ] || { echo "errors in$bad"; exit 1; }'
    )


def _bench(name: str) -> Step:
    program, options = str(CPP / f"bench/cpp/bench_{name}"), BENCHES[name].split()
    command = [program, "--device", "cuda", *options, "--seconds", "0.2"]
    if shutil.which("stdbuf"):  # a line at a time, so that none is lost at the limit
        command = ["stdbuf", "-oL", *command]
    output = FOLDER / f"bench_{name}.jsonl"
    return Step(f"bench {name}", command, 45, uses=("build c++",), stdout=output, may_be_cut=True)


def _bench_layer(python: str) -> list[str]:
    output = str(FOLDER / "bench_layer.jsonl")
    options = ["--device", "cuda", *LAYERS.split(), "--seconds", "1", "--output", output]
    return [python, "-m", "fomoe", "bench", *options]


# ---- The machine -----------------------------------------------------------------------------
_ASK_TORCH = """
import json, torch
facts = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    facts |= {"gpu": device.name, "compute_capability": f"{device.major}.{device.minor}",
              "gpu_memory": device.total_memory, "multiprocessors": device.multi_processor_count,
              "num_gpus": torch.cuda.device_count()}
print(json.dumps(facts))
"""


def machine() -> dict[str, Any]:
    """Facts about the GPU and the tools; "problem" is a sentence if something is missing."""
    facts: dict[str, Any] = {"num_cpus": os.cpu_count(), "python": sys.version.split()[0]}
    torch = _output(sys.executable, "-c", _ASK_TORCH)
    facts |= json.loads(torch) if torch else {}
    facts["nvcc"] = _output("nvcc", "--version").splitlines()[-1:]
    facts["commit"] = _output(
        "git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"
    )
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    facts["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
    if "torch" not in facts:
        facts["problem"] = f"{sys.executable} has no torch"
    elif "gpu" not in facts:
        facts["problem"] = f"torch {facts['torch']} finds no CUDA device on this machine"
    elif not facts["nvcc"]:
        facts["problem"] = "no nvcc on PATH to build the CUDA kernels with"
    return facts


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=50).stdout.strip()
    return ""


def print_machine() -> int:
    facts = machine()
    write_atomically(FOLDER / "machine.json", json.dumps(facts))
    problem = facts.pop("problem", "")
    print(json.dumps(facts, indent=1))
    name = f"{facts.get('gpu')}, torch {facts.get('torch')}"
    print(f"gpu-check: {problem}" if problem else name)
    return 1 if problem else 0


# ---- The command -----------------------------------------------------------------------------
def gather(folder: Path) -> None:
    """The results, the machine, all measurements and all logs: four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pattern in (("bench.jsonl", "*.jsonl"), ("log.txt", "*.log")):
        with open(folder / name, "w") as gathered:
            for path in sorted(FOLDER.glob(pattern)):
                if pattern == "*.log":
                    gathered.write(f"==== {path.name}\n")
                gathered.write(path.read_text(errors="replace"))
    for name in ("results.json", "machine.json"):
        with suppress(FileNotFoundError):
            shutil.copy(FOLDER / name, folder / name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--only", action="append", metavar="STEP", help="and what it builds on")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT"), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="list the steps")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output:
        options.output = Path(options.output).absolute()
    os.chdir(ROOT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.machine:
        return print_machine()
    chosen = chosen_stages(options.only)
    if options.dry_run:
        for step in (step for stage in chosen for step in stage):
            print(f"{step.name:<18} at most {step.seconds:3.0f} s  {' '.join(step.command)}")
        return 0
    for path in (*FOLDER.glob("*.log"), *FOLDER.glob("*.jsonl"), *FOLDER.glob("*.json")):
        path.unlink()
    about = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "minutes": options.minutes,
    }
    runner = Runner(FOLDER, 60 * options.minutes, about)
    for stage in chosen:
        runner.run([stage])
        if options.output:
            gather(options.output)
        if any(result.step == "machine" and result.status != "passed" for result in runner.results):
            break
    print(f"\n{table(runner.results)}")
    return 1 if runner.failed() else 0


def chosen_stages(only: Sequence[str] | None) -> list[list[Step]]:
    """All stages, or those of the named steps and of what these need."""
    everything = {step.name: step for stage in stages() for step in stage}
    wanted = list(only or everything)
    for name in wanted:
        if name not in everything:
            raise SystemExit(f"--only: expected one of {', '.join(everything)}, got {name!r}")
        before = everything[name].needs + everything[name].uses
        wanted += [need for need in before if need not in wanted]
    kept = ([step for step in stage if step.name in wanted] for stage in stages())
    return [stage for stage in kept if stage]


if __name__ == "__main__":
    sys.exit(main())
