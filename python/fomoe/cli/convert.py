# SPDX-License-Identifier: Apache-2.0
"""`fomoe convert`: a dense model into a Mixture-of-Experts model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from fomoe.convert.convert import Observer


def convert(
    source: Annotated[
        Path, typer.Argument(help="Hugging Face folder with safetensors, or a GGUF file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    method: Annotated[
        str,
        typer.Option(
            help="dot, dot-literal, random, weight-cluster, activation-cluster, core, tiers, prune."
        ),
    ] = "dot",
    expert_size: Annotated[int, typer.Option(help="Neurons of an expert.")] = 128,
    active_share: Annotated[
        float, typer.Option(help="Share of the experts that a token takes.")
    ] = 0.25,
    steps: Annotated[int, typer.Option(help="Training steps of each layer.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of calibration text.")] = 45056,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text file or folder; may be repeated. Default: Python's own text."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers to convert, for example 0-5,8; by default all.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, clusters and data order.")] = 0,
    max_load: Annotated[
        float | None,
        typer.Option(help="Even shares of the tokens that an expert may serve; by default any."),
    ] = None,
    distill_steps: Annotated[
        int, typer.Option(min=0, help="Then train assignments and routers end to end.")
    ] = 0,
    fine_tune_steps: Annotated[
        int, typer.Option(min=0, help="Then train the weights of the sparse model.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if any.")] = "",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; by default the model's own.")
    ] = "",
    resume: Annotated[bool, typer.Option(help="Go on with a conversion that was killed.")] = False,
) -> None:
    """Turn the dense model SOURCE (Llama, Mistral, Qwen2, Qwen3) into a Mixture-of-Experts OUT."""
    import torch

    from fomoe.convert.convert import convert as run
    from fomoe.convert.settings import Conversion
    from fomoe.devices import usable_device

    conversion = Conversion(
        method=method,
        expert_size=expert_size,
        active_share=active_share,
        steps=steps,
        tokens=tokens,
        layers=_layers(layers),
        seed=seed,
        max_load=max_load,
        distill_steps=distill_steps,
        fine_tune_steps=fine_tune_steps,
    )
    with _Screen() as screen:
        qualities = run(
            source,
            out,
            conversion,
            data=data or (),
            device=usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            dtype=_dtype(dtype),
            resume=resume,
            observer=screen.observer(),
        )
    errors = [quality.error for quality in qualities.values()]
    typer.echo(f"Mean local error {sum(errors) / len(errors):.4f}. Model in {out}")


class _Screen:
    """A line per finished layer above a bar with the running numbers."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True
        )
        self._task = self._bar.add_task("reading the model", total=None)

    def __enter__(self) -> "_Screen":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def observer(self) -> "Observer":
        from fomoe.convert.convert import Observer
        from fomoe.convert.end_to_end import EndToEndProgress
        from fomoe.convert.evaluate import LayerQuality
        from fomoe.convert.local_alignment import Progress as LayerProgress

        def layer_step(layer: int, at: LayerProgress) -> None:
            self._say(
                f"layer {layer} step {at.step}: loss {at.loss:.4f}, assignment entropy "
                f"{at.assignment_entropy:.2f}, memory {_memory()}"
            )

        def layer_done(layer: int, quality: LayerQuality) -> None:
            self._bar.console.print(
                f"layer {layer}: held-out error {quality.error:.4f}, usage entropy "
                f"{quality.usage_entropy:.2f}, dead {quality.dead_experts}, "
                f"always on {quality.always_on_experts}"
            )

        def stage_step(stage: str, at: EndToEndProgress) -> None:
            self._say(
                f"{stage} step {at.step}: loss {at.loss:.4f}, KL {at.kl:.4f}, memory {_memory()}"
            )

        return Observer(
            plan=self._bar.console.print,
            layer_step=layer_step,
            layer_done=layer_done,
            stage_step=stage_step,
        )

    def _say(self, text: str) -> None:
        self._bar.update(self._task, description=text)


def _memory() -> str:
    """The most that this process has held: on the GPU if it used one, else in RAM."""
    import resource

    import torch

    from fomoe.units import human_bytes

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return human_bytes(peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _layers(text: str) -> tuple[int, ...] | None:
    """ "0-2,5" -> (0, 1, 2, 5); "" -> None."""
    from fomoe.errors import UserError

    if not text:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            span = range(int(first), int(last or first) + 1)
        except ValueError:
            span = range(0)
        if not span:
            raise UserError(f"--layers: expected numbers like 0-5,8, got {text!r}")
        layers.update(span)
    return tuple(sorted(layers))


def _dtype(name: str) -> "torch.dtype | None":
    import torch

    from fomoe.errors import UserError

    known = {
        "": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise UserError(f"--dtype: expected float32, bfloat16 or float16, got {name!r}")
    return known[name]
