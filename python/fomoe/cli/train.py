# SPDX-License-Identifier: Apache-2.0
"""`fomoe train`: train across sites as a configuration file says."""

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
) -> None:
    """Train one model across sites as CONFIG says."""
    from fomoe.federation.config import load_config

    settings = load_config(config, overrides or [])
    from fomoe.federation.launch import train as run
    from fomoe.federation.run_folder import run_folder_of

    summary = run(settings, resume=resume)
    folder = run_folder_of(resume) if resume else settings.run.folder
    bigram = summary["bigram_entropy"]
    reference = "" if bigram is None else f" (bigram entropy of the text {bigram:.3f})"
    typer.echo(
        f"Assembled model: loss {summary['loss']:.3f} nats per {summary['token']}{reference}. "
        f"Results in {folder}; draw them with: fomoe report {folder}"
    )
