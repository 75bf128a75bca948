# SPDX-License-Identifier: Apache-2.0
"""`fomoe export`: a run's checkpoint as one model file."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder with a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="safetensors file to write.")],
) -> None:
    """Assemble the sites' checkpoint of RUN into one safetensors model OUT."""
    from fomoe.federation.checkpoint import export as write

    write(run, out)
