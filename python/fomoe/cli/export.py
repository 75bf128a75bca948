# SPDX-License-Identifier: Apache-2.0
"""`fomoe export`: a run's checkpoint, or a model, as one model for fomoe or for transformers."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[Path, typer.Argument(help="Run folder with a checkpoint, or a model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, or for fomoe a .safetensors file.")],
    to: Annotated[
        Literal["fomoe", "huggingface", "glm4-moe"],
        typer.Option(
            "--format",
            help="huggingface: for transformers with fomoe installed; glm4-moe: for transformers "
            "alone, which computes nearly the same.",
        ),
    ] = "fomoe",
) -> None:
    """Write the model that the sites of a run have trained, or MODEL itself, as one model OUT."""
    from fomoe.federation.export import export as write

    write(model, out, to)
