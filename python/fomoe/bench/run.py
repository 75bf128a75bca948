# SPDX-License-Identifier: Apache-2.0
"""The two benchmarks from the machine's facts to the last line printed."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from fomoe.bench import skip, table
from fomoe.bench.baselines import HOW_TO_GET_HUGGING_FACE, hugging_face_block
from fomoe.bench.clock import require_device
from fomoe.bench.layer import measure_layers
from fomoe.bench.machine import DTYPES, machine, versions
from fomoe.bench.shapes import parse_shapes
from fomoe.bench.timing import Plan, num_threads
from fomoe.errors import UserError
from fomoe.files import JsonLines

Records = list[dict[str, Any]]


def run_layers(
    *,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    plan: Plan | None = None,
    threads: int = 1,
    device: str = "cpu",
    output: Path | None = None,
) -> Records:
    """Measure the layer, print a table, and write ``output`` anew.

    Parameters
    ----------
    shapes
        Texts ``T,D,F,E,K``; the standard ones of the device by default.
    dtypes
        Of "bf16" and "fp32"; both by default, on a GPU the first.
    plan
        How often each case is repeated.
    threads
        CPU threads.
    device
        "cpu" or "cuda".
    output
        File of JSON lines, one for each record.

    Returns
    -------
    list[dict[str, Any]]
        A record for each case and contender.

    Raises
    ------
    UserError
        When a shape, dtype or device is none, ``output`` cannot be written, or a contender's output
        or gradients are wrong.
    """
    plan, cases, where = plan or Plan(), parse_shapes(shapes, device), require_device(device)
    names = tuple(dict.fromkeys(dtypes)) or tuple(DTYPES)[: 1 if device == "cuda" else None]
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    options = [part for shape in cases for part in ("--shape", str(shape))]
    options += [part for name in names for part in ("--dtype", name)]
    console = Console()
    with _open(output) as file, num_threads(threads):
        about = _about("layer", options, names, plan, threads, where)
        table.print_machine(console, about)
        if hugging_face_block() is None:
            table.say(console, HOW_TO_GET_HUGGING_FACE)
        with _progress() as show:
            groups = _written(measure_layers(cases, names, plan, show, where), about, file)
    table.print_layers(console, groups)
    return [record for records in groups for record in records]


def run_skip(
    *,
    models: Sequence[skip.Model] | None = None,
    plan: Plan | None = None,
    threads: int = 1,
    device: str = "cpu",
    output: Path | None = None,
) -> Records:
    """Measure what skipping ghosts saves, print a table per model, and write ``output`` anew.

    Parameters as those of :func:`run_layers`; ``models`` are :data:`fomoe.bench.skip.MODELS` or,
    on a GPU, :data:`fomoe.bench.skip.CUDA_MODELS` by default.

    Returns
    -------
    list[dict[str, Any]]
        A record for each model, part and share of ghosts.

    Raises
    ------
    UserError
        When the device is none, or ``output`` cannot be written.
    """
    plan, where = plan or Plan(), require_device(device)
    if models is None:
        models = skip.CUDA_MODELS if device == "cuda" else skip.MODELS
    console = Console()
    with _open(output) as file, num_threads(threads):
        about = _about("skip", ["--skip"], ("bf16",), plan, threads, where)
        table.print_machine(console, about)
        with _progress() as show:
            groups = _written(skip.measure_skipping(models, plan, show, where), about, file)
    table.print_skipping(console, groups)
    return [record for records in groups for record in records]


def _open(output: Path | None) -> Any:
    return nullcontext() if output is None else JsonLines(output, anew=True)


def _about(
    benchmark: str,
    options: Sequence[str],
    dtypes: Sequence[str],
    plan: Plan,
    threads: int,
    device: torch.device,
) -> dict[str, Any]:
    """What every record says about where it comes from."""
    repeat = ("--seconds", f"{plan.seconds:g}")
    if plan.repetitions is not None:
        repeat = ("--repetitions", str(plan.repetitions))
    on = () if device.type == "cpu" else ("--device", device.type)
    command = ["fomoe", "bench", *on, *options, *repeat, "--threads", str(threads)]
    return {
        "benchmark": benchmark,
        "command": shlex.join(command),
        "device": device.type,
        "machine": machine(dtypes, threads, device),
        "versions": versions(),
    }


def _written(
    groups: Iterable[Records], about: dict[str, Any], file: JsonLines | None
) -> list[Records]:
    """All groups with ``about`` in every record; a record is written when it is there."""
    complete = []
    for records in groups:
        complete.append([record | about for record in records])
        if file:
            for record in complete[-1]:
                file.write(record)
    return complete


@contextmanager
def _progress() -> Iterator[Callable[[str], object]]:
    """Shows what is measured on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        auto_refresh=False,  # a thread that draws would run into what is timed
    ) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=f"measuring {text}", refresh=True)
