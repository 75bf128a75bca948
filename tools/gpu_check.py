# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: everything that only a GPU can tell, in one command of at most 8 minutes.

    python tools/gpu_check.py [--minutes 8] [--only STEP]... [--output FOLDER] [--dry-run]

Builds for this machine, then probes what the emulation of the kernels assumes about the hardware,
then tests, measures, and looks for wrong accesses and races; results come in that order, so that
little time shows first whether the kernels are right. Needs nvcc, a CUDA build of torch and, in the
same environment, pybind11, cmake, ninja and pytest; no network. The package is installed by pip, or
by CMake alone where pip cannot (no scikit-build-core, or an old one). Training needs pydantic and
typer, too; wheels of what is missing are taken from build/wheels (`make gpu-wheels`).

The results are in build/gpu-check: results.json, a log per step, the measurements as JSON lines.
With --output, or the environment variable OUT, they are also gathered there in four files.
Exit status 1 if a step failed or was stopped at its limit.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from steps import Runner, Step, table, write_atomically

ROOT = Path(__file__).parents[1]
FOLDER = Path("build/gpu-check")  # commands run in ROOT
CPP = FOLDER / "cpp"  # build folder of the C++ tests and benchmarks
SITE = FOLDER / "site"  # where the package is installed
WHEELS = Path("build/wheels")  # of packages that this machine lacks and cannot download
# The shapes of the targets in docs/benchmarks.md.
BENCHES = {
    "topk_gate": "--shape qwen3-30b --shape qwen3-next",
    "permute": "--shape qwen3-30b --shape olmoe",
    "grouped_gemm": "--shape qwen3-30b --shape olmoe --shape deepseek-v3-slice --dtype bf16",
    "expert_mlp": "--shape qwen3-30b --shape sonicmoe-7b-n256 --dtype bf16",
}
LAYERS = ["32768,2048,768,128,8", "24576,1536,256,128,8"]
PYTESTS = {
    path.stem.removeprefix("test_"): [str(path.relative_to(ROOT))]
    for path in ROOT.glob("tests/cuda/test_*.py")
}
PARITY = PYTESTS.pop("parity")  # more than half of all: in two halves
PYTESTS |= {"parity 16 bit": [*PARITY, "-k", "float16"]}
PYTESTS |= {"parity 32, 64 bit": [*PARITY, "-k", "not float16"]}
PACKAGES = ("numpy", "cmake", "ninja", "pybind11", "scikit-build-core", "pytest", "pytest-timeout",
            "hypothesis", "safetensors", "pydantic", "typer", "rich", "transformers",
            "triton")  # fmt: skip


# ---- The steps -------------------------------------------------------------------------------
def stages() -> list[list[Step]]:
    """The steps of a stage run side by side."""
    python = sys.executable
    ours = {"PYTHONPATH": str(ROOT / SITE), "PYTHONUNBUFFERED": "1"}
    # Tests are small: to hand them between threads takes longest.
    test = ours | {"OMP_NUM_THREADS": "1"}
    cpp = {"uses": ("build c++",)}
    nccl = [python, "tests/cuda/nccl_ranks.py", "--sites"]
    return [
        [Step("machine", [python, "tools/gpu_check.py", "--machine"], 100)],
        [
            Step("build python", _shell(_install(python)), 200, ("machine",)),
            Step("build c++", _shell(_build_cpp()), 200, ("machine",)),
        ],
        [Step("probes", [str(CPP / "tests/cpp/cuda/probe_hopper")], 30, **cpp)],
        [
            Step("c++ tests", _ctest(), 75, environment={"OMP_NUM_THREADS": "4"}, **cpp),
            Step("package", [python, "-c", _IMPORT], 60, ("build python",), environment=ours),
        ],
        # A process for each file: after an illegal access, all that follows in its process fails.
        [
            Step(f"pytest {name}", _pytest(python, name), 125, ("package",), environment=test)
            for name in sorted(PYTESTS)
        ],
        *(
            [Step(f"nccl {sites}", [*nccl, sites], 60, ("package",), environment=ours)]
            for sites in ("1,1", "2,2", "3,1")
        ),
        [Step("all-to-all nccl", _shell(_all_to_all()), 60, **cpp)],
        *([_bench(name)] for name in BENCHES),
        [
            Step(
                "train",
                [python, "bench/federation/train_on_gpu.py"],
                150,
                ("package",),
                environment=ours,
                stdout=FOLDER / "bench_train.jsonl",
                may_be_cut=True,
            )
        ],
        [
            Step(
                "generation",
                [
                    python,
                    "bench/generation/speed.py",
                    "--device",
                    "cuda",
                    "--output",
                    str(FOLDER / "bench_generation.jsonl"),
                ],
                120,
                ("package",),
                environment=ours,
                may_be_cut=True,
            )
        ],
        [
            Step(
                "bench layer",
                [python, "-c", _bench_layer()],
                75,
                ("package",),
                environment=ours,
                may_be_cut=True,
            )
        ],
        [Step(tool, _shell(_sanitize(tool)), 150, **cpp) for tool in _SANITIZERS],
    ]


_SANITIZERS = ("memcheck", "racecheck", "synccheck")
_IMPORT = (
    "import fomoe; from fomoe import _C; fomoe.show_build(); "
    "assert _C.compiled_with_cuda(), 'the package was built without CUDA kernels'"
)


def _shell(script: str) -> list[str]:
    return ["bash", "-ec", script]


def _install(python: str) -> str:
    by_pip = (
        f"{python} -m pip install --no-index --no-build-isolation --no-deps --upgrade"
        f" --target {SITE} . -Cbuild-dir={FOLDER}/python -Ccmake.define.FOMOE_CUDA=ON"
    )
    build = FOLDER / "cmake"
    info = SITE / "fomoe-0.dist-info"
    by_cmake = (
        f"echo 'pip cannot install it: building with CMake alone'; rm -rf {SITE};"
        f" cmake -S . -B {build} -G Ninja -DFOMOE_CUDA=ON -DCMAKE_BUILD_TYPE=Release"
        f" -DPython_EXECUTABLE={python} -Dpybind11_DIR=$({python} -m pybind11 --cmakedir);"
        f" cmake --build {build}; mkdir -p {info}; cp -r python/fomoe {SITE};"
        f" printf 'Metadata-Version: 2.1\\nName: fomoe\\nVersion: 0\\n' >{info}/METADATA;"
        f" cmake --install {build} --prefix {SITE}"
    )
    # What the machine lacks may have been brought along.
    carried = (
        f"{python} -m pip install --no-index --no-deps --upgrade --target {SITE} {WHEELS}/*.whl"
    )
    return f"({by_pip} || ({by_cmake})); if [ -d {WHEELS} ]; then {carried}; fi"


def _build_cpp() -> str:
    # -k 0: what does not compile does not keep the rest from being built and run.
    options = "-DFOMOE_BUILD_PYTHON=OFF -DFOMOE_BUILD_TESTS=ON -DFOMOE_BUILD_BENCH=ON"
    return (
        f"cmake -S . -B {CPP} -G Ninja {options} -DFOMOE_CUDA=ON -DFOMOE_TEST_ON_GPU=ON"
        f" -DFOMOE_SANITIZE=OFF -DCMAKE_BUILD_TYPE=Release; cmake --build {CPP} -- -k 0"
    )


def _ctest() -> list[str]:
    folder = str(CPP / "tests/cpp/cuda")
    return ["ctest", "--test-dir", folder, "--output-on-failure", "-j", "4", "-E", "probe_hopper"]


def _pytest(python: str, name: str) -> list[str]:
    # A line for each test, so that the last one tells where a kernel hangs.
    options = ["-vv", "-rfEs", "--durations=5", "--tb=short", "--maxfail=30"]
    options += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    plugin = (_version("pytest-timeout") or "0").split(".")
    if [int(part) for part in plugin[:2]] >= [2, 3]:  # ends in time to print what failed
        options += ["--timeout=90", "--timeout-method=thread", "--session-timeout=110"]
    return [python, "-m", "pytest", *options, *PYTESTS[name]]


def _sanitize(tool: str) -> str:
    """The tests of the tensor core kernels first; four at a time; one that hangs ends alone."""
    tests = f"{CPP}/tests/cpp/cuda"
    one = (
        f"log=$(mktemp); timeout -k 5 60 compute-sanitizer --tool {tool} --print-limit 10"
        ' --error-exitcode 9 $0 >$log 2>&1; status=$?; echo "== $0: exit status $status";'
        ' grep -v "^ok " $log | tail -n 40; rm $log; [ $status = 0 ]'
    )
    return (
        f"(ls {tests}/test_sm*_products; ls {tests}/test_* | grep -v test_sm) | grep -v '\\.'"
        f" | xargs -r -P 4 -n 1 bash -c '{one}'"
    )


def _bench(name: str) -> Step:
    program, options = str(CPP / f"bench/cpp/bench_{name}"), BENCHES[name].split()
    command = [program, "--device", "cuda", *options, "--seconds", "0.3"]
    return Step(
        f"bench {name}",
        command,
        45,
        uses=("build c++",),
        environment=_library_path(),
        stdout=FOLDER / f"bench_{name}.jsonl",
        may_be_cut=True,
    )


def _all_to_all() -> str:
    """Four ranks on one GPU, each a host of its own to NCCL: whether it ends well, not how fast."""
    program = str(CPP / "bench/cpp/bench_all_to_all")
    environment = "NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2"
    torch = importlib.util.find_spec("torch")
    packages = Path(torch.origin).parents[1] if torch is not None and torch.origin else ROOT
    found = sorted(packages.glob("nvidia/*/lib/libnccl.so.2"))
    library = f" --nccl {found[0]}" if found else ""
    return (
        "folder=$(mktemp -d); ranks=; for rank in 0 1 2 3; do"
        f" env {environment} NCCL_HOSTID=$rank timeout 50 {program} --transport nccl"
        f" --id-file $folder/id --rank $rank --sites 2 --ranks-per-site 2 --tokens 256"
        f' --dim 512 --repeats 2{library} --json >$folder/$rank & ranks="$ranks $!"; done;'
        ' for rank in $ranks; do wait "$rank"; done;'
        f" cp $folder/0 {FOLDER}/bench_all_to_all.jsonl; cat $folder/0; rm -r $folder"
    )


def _library_path() -> dict[str, str]:
    """Where the benchmarks find cuBLAS when the toolkit has none: in torch's packages."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return {}
    folders = {
        str(path.parent)
        for path in Path(torch.origin).parents[1].glob("nvidia/*/lib/libcublas.so.*")
    }
    own = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join([*filter(None, [own]), *sorted(folders)])}


def _bench_layer() -> str:
    """Not by the command `fomoe`, which needs typer as well."""
    output = str(FOLDER / "bench_layer.jsonl")
    return (
        "from pathlib import Path; from fomoe.bench import Plan, run_layers; "
        f"run_layers(shapes={LAYERS}, dtypes=['bf16'], plan=Plan(seconds=1.0), device='cuda', "
        f"output=Path({output!r}))"
    )


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
    facts["packages"] = {name: _version(name) for name in PACKAGES}
    facts["nvcc"] = _output("nvcc", "--version").splitlines()[-1:]
    facts["tools"] = {name: _output(name, "--version").splitlines()[:1] for name in _TOOLS}
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
    elif not facts["tools"]["cmake"] or not facts["tools"]["ninja"]:
        facts["problem"] = "no cmake, or no ninja, on PATH"
    return facts


_TOOLS = ("cmake", "ninja", "c++", "compute-sanitizer")


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=80).stdout.strip()
    return ""


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def print_machine() -> int:
    facts = machine()
    write_atomically(FOLDER / "machine.json", json.dumps(facts))
    problem = facts.pop("problem", "")
    print(json.dumps(facts, indent=1))
    missing = [name for name, version in facts["packages"].items() if version is None]
    name = f"{facts.get('gpu')}, torch {facts.get('torch')}"
    name += f"; without {', '.join(missing)}" if missing else ""
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


def failures(runner: Runner) -> Iterator[str]:
    """The end of the log of each step that did not pass."""
    for result in runner.results:
        if result.status in ("failed", "timed out"):
            yield f"\n---- {result.step}: {result.status}"
            yield from (line[:160] for line in result.tail.splitlines()[-12:])


def measurements() -> Iterator[str]:
    """A line for each measurement of a program in C++, and for each contender of a layer."""
    for path in sorted(FOLDER.glob("bench_*.jsonl")):
        for text in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # cut off, or of another kind
                yield _measurement(json.loads(text))


def _measurement(line: dict[str, Any]) -> str:
    if "bench" in line:
        return _training(line)
    if "contender" in line:
        size = ",".join(str(value) for value in line["shape"].values())
        name = f"{size} {line['pass']} {line['contender']}"
        return f"{name:<52} {line['median_ms'] * 1e3:9.1f} us  ratio {line['ratio']:.2f}"
    parts = (line.get(key, "") for key in ("op", "shape", "layer", "path", "T"))
    text = f"{' '.join(str(part) for part in parts if part):<52} {line['median_us']:9.1f} us"
    for key, unit in (("gb_per_s", "GB/s"), ("tflops", "TFLOP/s")):
        text += f"  {line[key]:.0f} {unit}" if key in line else ""
    for key in ("of_copy", "of_dense", "cost"):
        text += f"  {key} {line[key]['median']:.2f}" if line.get(key) else ""
    return text


def _training(line: dict[str, Any]) -> str:
    name = f"{line['bench']} {line['shape']} {line.get('strategy', '')} on {line['device']}"
    if "moe_share" in line:
        return f"{name:<52} {line['step_ms'] * 1e3:9.1f} us  MoE {line['moe_share']['median']:.0%}"
    peak = max(site.get("peak_device", 0) for site in line["memory_per_site"])
    text = f"{name:<52} {line['tokens_per_second']:9,.0f} tokens/s  {peak / 1e9:.2f} GB per site"
    text += f"  loss {line['loss']:.4f}"
    return text + (
        f" ({line['of_loss_on_cpu']:.4f} of the CPU's)" if "of_loss_on_cpu" in line else ""
    )


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
    # cmake and ninja may be packages of this Python, whose environment need not be active.
    # nvcc and compute-sanitizer may be off PATH, in the toolkit's usual place.
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join(folders)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.machine:
        return print_machine()
    chosen = chosen_stages(options.only)
    if options.dry_run:
        for step in (step for stage in chosen for step in stage):
            print(f"{step.name:<24} at most {step.seconds:3.0f} s  {' '.join(step.command)}")
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
    print("\n".join(["", *failures(runner), "", *measurements(), "", table(runner.results)]))
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
