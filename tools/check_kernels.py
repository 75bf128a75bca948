# SPDX-License-Identifier: Apache-2.0
"""Checks the machine code that nvcc made of the kernels, and prints one line per kernel.

    python tools/check_kernels.py BUILD_FOLDER [--emulated FILE]

Fails on a performance message of ptxas (C75xx), on spills, stack or local memory, on a tensor core
kernel without the instructions it is there for, and on wgmma that ptxas serialised. A kernel with
`probe` in its name exists only to learn something about the hardware and is exempt. FILE is what
the program kernel_table of the C++ tests counted while it ran the kernels emulated.

Needs cuobjdump and nvdisasm, on PATH or from the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm, and c++filt from binutils.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Requirement:
    """Kernels whose name matches contain, compiled for `architecture`, these instructions."""

    kernels: str
    architecture: str
    instructions: tuple[str, ...]


# Hopper kernels load by TMA, gather by LDGSTS, and store by TMA.
REQUIREMENTS = (
    Requirement(r"^sm80::(row|weight)_product_kernel", "sm_80", ("HMMA", "LDSM", "LDGSTS")),
    Requirement(
        r"^sm90::(row|weight)_product_kernel",
        "sm_90a",
        ("HGMMA", "UTMALDG", "LDGSTS", "UTMASTG", "USETMAXREG"),
    ),
)

LISTED = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDSM", "STSM", "USETMAXREG")


@dataclass(slots=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0  # static
    instructions: Counter[str] = field(default_factory=Counter)
    highest_register: int = 0


# ---- Reading ---------------------------------------------------------------------------------
def find_tools() -> dict[str, str]:
    """An environment whose PATH has cuobjdump and nvdisasm, from their packages if installed."""
    folders = []
    for name in ("cuobjdump", "nvdisasm"):
        try:
            files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
        except importlib.metadata.PackageNotFoundError:
            continue
        folders += [str(Path(f.locate()).parent) for f in files if f.name == name]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    for name in ("cuobjdump", "nvdisasm", "c++filt"):
        if shutil.which(name, path=path) is None:
            sys.exit(
                f"error: {name} was not found; install the packages nvidia-cuda-cuobjdump and "
                "nvidia-cuda-nvdisasm, and binutils for c++filt"
            )
    return {**os.environ, "PATH": path}


def find_objects(build: Path) -> list[Path]:
    """The objects that nvcc made in a build folder of CMake."""
    commands = json.loads((build / "compile_commands.json").read_text())
    return sorted(
        build / entry["output"]
        for entry in commands
        if entry["file"].endswith(".cu") and "-gencode" in entry["command"]
    )


def short_name(demangled: str) -> str:
    """``sm90::kernel<64, true>`` of ``void fomoe::cuda::sm90::(anonymous ...)::kernel<...>(...)``.

    >>> short_name("void fomoe::cuda::(anonymous namespace)::copy<(bool)1>(float const*)")
    'copy<(bool)1>'
    """
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return name.replace("fomoe::cuda::", "").replace("fomoe::", "")


def read_usage(text: str) -> dict[tuple[str, str], Kernel]:
    """Kernels by mangled name and architecture, from ``cuobjdump --dump-resource-usage``."""
    kernels = {}
    architecture = ""
    for line, following in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):$", line):
            usage = dict(re.findall(r"([A-Z]+):(\d+)", following))
            kernels[match[1], architecture] = Kernel(
                match[1],
                architecture,
                registers=int(usage["REG"]),
                stack_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
                shared_bytes=int(usage["SHARED"]),
            )
    return kernels


def read_instructions(text: str, kernels: dict[tuple[str, str], Kernel]) -> None:
    """Adds what ``cuobjdump --dump-sass`` says."""
    architecture = ""
    kernel = None
    for line in text.splitlines():
        if match := re.match(r"\s*code for (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[match[1], architecture]
        elif kernel and (
            match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([\w.]+)([^;]*);", line)
        ):
            opcode = match[1].split(".")
            kernel.instructions[opcode[0]] += 1
            if opcode[0] == "WARPGROUP":
                kernel.instructions[".".join(opcode[:2])] += 1
            for register in re.findall(r"\bR(\d+)", match[2]):
                kernel.highest_register = max(kernel.highest_register, int(register))


def read_object(path: Path, environment: dict[str, str]) -> list[Kernel]:
    def dump(*command: str) -> str:
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return run.stdout

    kernels = read_usage(dump("cuobjdump", "--dump-resource-usage", str(path)))
    if not kernels:
        return []
    read_instructions(dump("cuobjdump", "--dump-sass", str(path)), kernels)
    names = dump("c++filt", *(kernel.name for kernel in kernels.values())).splitlines()
    for kernel, name in zip(kernels.values(), names, strict=True):
        kernel.name = short_name(name)
    return list(kernels.values())


# ---- Judging ---------------------------------------------------------------------------------
def faults_of_messages(text: str) -> list[str]:
    """What nvcc's output tells that no kernel may have."""
    faults = [line.strip() for line in text.splitlines() if re.search(r"\bC75\d\d\b", line)]
    compiled = ""
    for line in text.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            compiled = match[1]
        match = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if match and match.groups() != ("0", "0"):
            faults.append(f"{compiled}: {match[1]} bytes spill stores, {match[2]} spill loads")
    return [fault for fault in dict.fromkeys(faults) if "probe" not in fault]


def faults_of(kernel: Kernel) -> list[str]:
    """What is wrong with one kernel."""
    if "probe" in kernel.name:
        return []
    count = kernel.instructions
    faults = []
    if kernel.stack_bytes:
        faults.append(f"{kernel.stack_bytes} bytes of stack or local memory")
    faults += [f"{count[name]} {name} (local memory)" for name in ("LDL", "STL") if count[name]]
    for requirement in REQUIREMENTS:
        if kernel.architecture == requirement.architecture and re.search(
            requirement.kernels, kernel.name
        ):
            faults += [f"no {name}" for name in requirement.instructions if not count[name]]
    arrivals = count["WARPGROUP.ARRIVE"]
    if count["HGMMA"] > 1 and count["HGMMA"] == arrivals == count["WARPGROUP.DEPBAR"]:
        faults.append(f"wgmma is serialised: {arrivals} HGMMA, each waited for")
    return [f"{kernel.name} ({kernel.architecture}): {fault}" for fault in faults]


def unmet_requirements(kernels: list[Kernel]) -> list[str]:
    """Requirements that no kernel matches: the table is out of date."""
    return [
        f"no kernel for {requirement.architecture} matches {requirement.kernels!r}, of which the "
        "table in tools/check_kernels.py knows"
        for requirement in REQUIREMENTS
        if not any(
            kernel.architecture == requirement.architecture
            and re.search(requirement.kernels, kernel.name)
            for kernel in kernels
        )
    ]


# ---- Printing --------------------------------------------------------------------------------
def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print(first, *rest, sep="  ")
    print()


def print_kernels(kernels: list[Kernel]) -> None:
    header = ("compiled kernel", "for", "registers", "highest", "shared", *LISTED)
    rows = [
        (
            kernel.name,
            kernel.architecture,
            str(kernel.registers),
            f"R{kernel.highest_register}",
            str(kernel.shared_bytes),
            *(str(kernel.instructions[name] or "") for name in LISTED),
        )
        for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture))
    ]
    print_table([header, *rows])


def print_emulated(path: Path) -> None:
    """One JSON object per line, all with the same keys."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    print_table([tuple(rows[0]), *(tuple(str(cell) for cell in row.values()) for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="build folder of CMake, with nvcc's objects")
    parser.add_argument("--emulated", type=Path, help="what kernel_table counted")
    arguments = parser.parse_args()

    objects = find_objects(arguments.build)
    environment = find_tools() if objects else {}
    kernels = []
    faults = []
    for path in objects:
        kernels += read_object(path, environment)
        faults += faults_of_messages(path.with_name(path.name + ".log").read_text())
    if objects:
        faults += unmet_requirements(kernels)
        faults += [fault for kernel in kernels for fault in faults_of(kernel)]
        print_kernels(kernels)
    else:
        print(f"{arguments.build} was built without nvcc: no machine code to check.")
    if arguments.emulated:
        print_emulated(arguments.emulated)
    if faults:
        sys.exit("\n".join(["error: kernels fall short:", *faults]))


if __name__ == "__main__":
    main()
