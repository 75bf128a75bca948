# SPDX-License-Identifier: Apache-2.0
"""`fomoe train`: train across sites as a configuration file says."""

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Option(help="TOML file with the settings.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]...",
            help="Settings that win over the file, for example federation.local_steps=20.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder, or the checkpoint in it, to continue from.")
    ] = None,
    site: Annotated[
        int | None,
        typer.Option(
            help="Under torchrun: the site of this machine's ranks, from 0; by default it follows "
            "from the number of the machine or of the rank."
        ),
    ] = None,
) -> None:
    """Train one model across sites as CONFIG says: all on this machine, or on the ranks that
    torchrun started ("torchrun --nproc-per-node=4 -m fomoe train --config ...")."""
    from fomoe.errors import UserError
    from fomoe.federation.config import load_config

    try:
        settings = load_config(config, overrides or [])
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        raise typer.Exit(2) from None  # of the ranks on this machine, one says it
    from fomoe.federation.launch import train as run
    from fomoe.federation.run_folder import run_folder_of

    summary = run(settings, resume=resume, site=site)
    if os.environ.get("RANK", "0") != "0":
        return  # of torchrun's ranks, one says it
    folder = run_folder_of(resume) if resume else settings.run.folder
    bigram = summary["bigram_entropy"]
    reference = "" if bigram is None else f" (bigram entropy of the text {bigram:.3f})"
    typer.echo(
        f"Assembled model: loss {summary['loss']:.3f} nats per {summary['token']}{reference}. "
        f"Results in {folder}; draw them with: fomoe report {folder}"
    )
