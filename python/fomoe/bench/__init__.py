# SPDX-License-Identifier: Apache-2.0
"""``fomoe bench``: the layer against what else computes it, and what skipping ghosts saves."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fomoe.bench.baselines import HOW_TO_GET_HUGGING_FACE, hugging_face_block
from fomoe.bench.layer import measure_layers
from fomoe.bench.machine import DTYPE_NAMES, machine, versions
from fomoe.bench.shapes import parse_shapes
from fomoe.bench.table import add_layer_row, layer_table, print_layer_legend, print_machine
from fomoe.bench.timing import Plan, num_threads
from fomoe.errors import UserError
from fomoe.files import JsonLines

__all__ = ["Plan", "run_layers"]


def run_layers(
    *,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    plan: Plan | None = None,
    threads: int = 1,
    output: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure the layer, print one table, and write JSON lines to ``output``, anew.

    Parameters
    ----------
    shapes
        Texts ``T,D,F,E,K``; the standard ones by default.
    dtypes
        Of "bf16" and "fp32"; both by default.
    plan
        How often each case is repeated.
    threads
        Of the process.
    output

    Returns
    -------
    list[dict[str, Any]]
        One record per case and contender: the lines of ``output``.

    Raises
    ------
    UserError
        When a shape or dtype is none, or ``output`` cannot be written.
    RuntimeError
        When a contender's output or gradients are wrong.
    """
    plan = plan or Plan()
    cases = parse_shapes(shapes)
    names = tuple(dtypes) or tuple(DTYPE_NAMES)
    for name in names:
        if name not in DTYPE_NAMES:
            raise UserError(f"--dtype: expected one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    command = ["fomoe", "bench", *_command(plan, threads)]
    command += [part for shape in cases for part in ("--shape", str(shape))]
    command += [part for name in names for part in ("--dtype", name)]
    console, table, records = Console(), layer_table(), []
    with ExitStack() as stack:
        file = stack.enter_context(JsonLines(output, anew=True)) if output else None
        stack.enter_context(num_threads(threads))
        origin = {"benchmark": "layer"}
        about: dict[str, Any] = {
            "machine": machine(names, threads),
            "versions": versions(),
            "command": shlex.join(command),
        }
        print_machine(console, about["machine"], about["versions"])
        if hugging_face_block() is None:
            console.print(HOW_TO_GET_HUGGING_FACE, soft_wrap=True, highlight=False)
        gemm_gflops = about["machine"]["gemm_gflops"]
        with _progress() as show:
            for case in measure_layers(cases, names, plan, gemm_gflops, show):
                add_layer_row(table, case)
                for record in case:
                    records.append(origin | record | about)
                    if file:
                        file.write(records[-1])
    console.print(table)
    print_layer_legend(console)
    return records


def _command(plan: Plan, threads: int) -> list[str]:
    if plan.repetitions is not None:
        return ["--repetitions", str(plan.repetitions), "--threads", str(threads)]
    return ["--seconds", f"{plan.seconds:g}", "--threads", str(threads)]


@contextmanager
def _progress() -> Iterator[Callable[[str], object]]:
    """Shows what is measured on a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
