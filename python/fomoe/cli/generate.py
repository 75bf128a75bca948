# SPDX-License-Identifier: Apache-2.0
"""`fomoe generate`: text from a model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Precision(StrEnum):
    """Of the weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


def generate(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Model of fomoe export or fomoe convert, a file or folder; or the folder of a run."
        ),
    ],
    prompt: Annotated[
        list[str], typer.Option(help="Text to go on from; several are done together.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits; 0: always the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that have this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:1.")] = "cpu",
    cuda_graph: Annotated[
        bool, typer.Option(help="Launch each step on the GPU at once; for one GPU.")
    ] = False,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the weights; by default what the file has.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json; by default the one beside the model.")
    ] = None,
) -> None:
    """Continue every PROMPT. The text comes as it is made; how long it took is said on stderr."""
    from fomoe.generate.command import Request, run
    from fomoe.generate.sampling import Sampling

    try:
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}".replace("_", "-", 1)) from None
    if max_new_tokens < 1:
        raise typer.BadParameter(f"--max-new-tokens: expected at least 1, got {max_new_tokens}")
    run(
        Request(
            checkpoint=checkpoint,
            prompts=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            device=device,
            cuda_graph=cuda_graph,
            dtype=None if precision is None else precision.value,
            tokenizer=tokenizer,
        )
    )
