# SPDX-License-Identifier: Apache-2.0
"""`fomoe demo`: the three strategies side by side on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    folder: Annotated[Path, typer.Option(help="Where runs and report go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
) -> None:
    """Train ddp, diloco and fomoe from the same weights and data, and compare them."""
    from fomoe.demo import run

    run(folder=folder, seed=seed)
