# SPDX-License-Identifier: Apache-2.0
"""`fomoe bench`: speed on this machine."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from fomoe.errors import UserError


def bench(
    skip: Annotated[
        bool, typer.Option("--skip", help="What skipping ghosts saves, instead of the layers.")
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="T,D,F,E,K", help="Layer to measure; repeatable. Default: five."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bf16 or fp32; repeatable. Default: both.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Of every case; without it, --seconds decides.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="For every case; at least 7 repetitions are made.")
    ] = 10.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File of JSON lines to write, anew.")] = None,
) -> None:
    """Time the MoE layer against plain torch and Hugging Face's (extra hf).

    Without options it takes 8 to 12 minutes.
    """
    from fomoe.bench import Plan, run_layers, run_skip

    if not math.isfinite(seconds):
        raise UserError(f"--seconds: expected a finite number, got {seconds}")
    if threads > (num_cpus := os.cpu_count() or 1):
        raise UserError(f"--threads: expected at most the {num_cpus} CPUs here, got {threads}")
    plan = Plan(seconds=seconds, repetitions=repetitions)
    if not skip:
        run_layers(
            shapes=shape or (),
            dtypes=dtype or (),
            plan=plan,
            threads=threads,
            device=device,
            output=output,
        )
    elif shape or dtype:
        raise UserError("--skip: expected no --shape and no --dtype, as it measures whole models")
    else:
        run_skip(plan=plan, threads=threads, device=device, output=output)
