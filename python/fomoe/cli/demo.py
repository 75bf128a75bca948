# SPDX-License-Identifier: Apache-2.0
"""`fomoe demo`: the four strategies side by side on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Option(help="Where runs and report go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that win over the demo's."),
    ] = None,
) -> None:
    """Train ddp, ep, diloco and fomoe from the same weights and data, and compare them."""
    from fomoe.demo import run

    result = run(folder=folder, seed=seed, overrides=overrides or [])
    if not all(verdict["holds"] for verdict in result["verdicts"] if verdict["required"]):
        raise typer.Exit(1)
