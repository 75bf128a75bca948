# SPDX-License-Identifier: Apache-2.0
"""Convert a dense model: check, align layer by layer, assemble, train on, write."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fomoe.convert.activations import feed_forward_inputs
from fomoe.convert.assemble import assemble, dense_weights
from fomoe.convert.dense import DenseLayer
from fomoe.convert.end_to_end import EndToEndProgress, distill, fine_tune
from fomoe.convert.evaluate import LayerQuality, layer_quality
from fomoe.convert.local_alignment import Progress, Training
from fomoe.convert.memory import Memory, memory_estimate
from fomoe.convert.methods import METHODS, LayerResult, convert_layer
from fomoe.convert.settings import Conversion, converted_config, expert_shape
from fomoe.convert.text import CalibrationText, calibration_text
from fomoe.convert.work_folder import WorkFolder
from fomoe.data.tokenization import Tokenization, tokenization
from fomoe.errors import UserError
from fomoe.files import cannot, sync_folder, write_text
from fomoe.models import Decoder, DecoderConfig, FeedForward, parameter_count, save_model
from fomoe.models.pretrained import load_dense
from fomoe.units import human_bytes, human_count

__all__ = ["Observer", "align_layers", "convert", "layer_seed"]

_BYTE_VOCABULARY = 256
_SEPARATOR = "\n"


@dataclass
class Observer:
    """Told what happens; each does nothing by default."""

    plan: Callable[[str], object] = lambda text: None
    layer_step: Callable[[int, Progress], object] = lambda layer, progress: None
    layer_done: Callable[[int, LayerQuality], object] = lambda layer, quality: None
    stage_step: Callable[[str, EndToEndProgress], object] = lambda stage, progress: None


def convert(
    source: Path,
    out: Path,
    conversion: Conversion,
    *,
    data: Sequence[str | Path] = (),
    device: torch.device,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> dict[int, LayerQuality]:
    """Convert the dense model ``source`` and write the result to the folder ``out``.

    ``out`` gets the model, its tokenizer and ``conversion.json``, which says how it was made and
    how good each layer is on held-out text. A killed conversion goes on with ``resume`` to the same
    bits (same torch, device and number of threads): finished layers are kept, the end-to-end stages
    start again.

    Raises
    ------
    UserError
        For a setting, model, text, device or disk that does not fit, before any work.
    """
    observer = observer or Observer()
    if out.exists():
        raise UserError(f"OUT: {out} exists already")
    dense, tokenizer = load_dense(source, dtype=dtype)
    config = converted_config(dense.config, conversion)
    element_size = dense.embedding.weight.element_size()
    memory = memory_estimate(dense.config, conversion, element_size)
    _require_memory(memory, device)
    _require_disk(config, element_size, out)
    text = _calibration_text(dense.config, tokenizer, data, conversion)
    observer.plan(_plan(config, conversion, dense.config, memory))
    work = WorkFolder(
        out,
        {
            "source": str(source.resolve()),
            "text": text.sha256,
            "dtype": str(dense.embedding.weight.dtype),
            **asdict(conversion),
        },
        resume=resume,
    )
    dense.to(device).requires_grad_(False)
    results, qualities = align_layers(dense, text, conversion, work, observer)
    model = _finish(dense, config, results, text, conversion, observer)
    report = {
        "source": source.name,
        "dtype": str(dense.embedding.weight.dtype),
        "settings": asdict(conversion),
        "text_sha256": text.sha256,
        "layers": {layer: asdict(quality) for layer, quality in qualities.items()},
    }
    _write(model, out, tokenizer, json.dumps(report, indent=1) + "\n")
    work.remove()
    return qualities


def _write(model: Decoder, out: Path, tokenizer: Mapping[str, bytes], report: str) -> None:
    """The folder ``out``, which appears when it is whole: until then the work can be resumed."""
    partial = out.with_name(f".{out.name}.incomplete")
    with cannot(f"write {out}"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save_model(model, partial, tokenizer)
            write_text(partial / "conversion.json", report)
            partial.rename(out)
            sync_folder(out.absolute().parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def align_layers(
    dense: Decoder,
    text: CalibrationText,
    conversion: Conversion,
    work: WorkFolder,
    observer: Observer,
) -> tuple[dict[int, LayerResult], dict[int, LayerQuality]]:
    """Results and held-out quality of every layer to convert, stored in ``work`` one by one."""
    shape, method = expert_shape(dense.config, conversion), METHODS[conversion.method]
    layers = conversion.layers or tuple(range(dense.config.num_layers))
    done = {layer: stored for layer in layers if (stored := work.load(layer)) is not None}
    missing = set(layers) - set(done)
    tokens_NS = torch.cat([text.training, text.held_out])
    inputs = feed_forward_inputs(dense, tokens_NS, missing) if missing else iter(())
    for index, inputs_TD in inputs:
        feed_forward = dense.layers[index].get_submodule("feed_forward")
        assert isinstance(feed_forward, FeedForward)
        weights = dense_weights(feed_forward)
        training, held_out = (
            DenseLayer(weights, part)
            for part in torch.split(inputs_TD, [text.training.numel(), text.held_out.numel()])
        )
        settings = Training(
            steps=conversion.steps,
            batch_size=conversion.batch_size,
            seed=layer_seed(conversion.seed, index),
            max_load=conversion.max_load,
        )

        def report(progress: Progress, index: int = index) -> None:
            observer.layer_step(index, progress)

        result = convert_layer(method, training, shape.num_experts, shape.top_k, settings, report)
        products_TEE = held_out.expert_products(result.expert, shape.num_experts)
        quality = layer_quality(held_out, result, method, shape.top_k, products_TEE)
        work.store(index, result, quality)
        done[index] = result, quality
        observer.layer_done(index, quality)
    return (
        {layer: done[layer][0] for layer in sorted(done)},
        {layer: done[layer][1] for layer in sorted(done)},
    )


def layer_seed(seed: int, layer: int) -> int:
    """A seed of its own for every layer, so that the order of layers changes nothing."""
    return seed * 100_003 + layer


def _finish(
    dense: Decoder,
    config: DecoderConfig,
    results: dict[int, LayerResult],
    text: CalibrationText,
    conversion: Conversion,
    observer: Observer,
) -> Decoder:
    """The end-to-end stages that are asked for, and the model."""
    method, top_k = METHODS[conversion.method], expert_shape(dense.config, conversion).top_k

    def reporting(stage: str) -> Callable[[EndToEndProgress], object]:
        return lambda progress: observer.stage_step(stage, progress)

    if conversion.distill_steps and method.routed:
        results = distill(
            dense, results, top_k, method, text.training, conversion, reporting("distill")
        )
    model = assemble(dense, config, results)
    if conversion.fine_tune_steps:
        model = fine_tune(model, dense, text.training, conversion, reporting("fine-tune"))
    return model


def _calibration_text(
    config: DecoderConfig,
    tokenizer: Mapping[str, bytes],
    data: Sequence[str | Path],
    conversion: Conversion,
) -> CalibrationText:
    length = conversion.sequence_length
    if config.context_length:
        length = min(length, config.context_length)
    return calibration_text(
        data,
        _tokenization(config, tokenizer),
        tokens=conversion.tokens,
        held_out_tokens=conversion.held_out_tokens,
        sequence_length=length,
    )


def _tokenization(config: DecoderConfig, tokenizer: Mapping[str, bytes]) -> Tokenization:
    if "tokenizer.json" in tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tokenizer.json")
            path.write_bytes(tokenizer["tokenizer.json"])
            return tokenization(str(path), _SEPARATOR)
    if config.vocab_size != _BYTE_VOCABULARY:
        raise UserError(
            "SOURCE: expected a tokenizer.json beside the model, as its vocabulary of "
            f"{config.vocab_size} is not that of bytes, got none"
        )
    return tokenization("", _SEPARATOR)


def _require_memory(memory: Memory, device: torch.device) -> None:
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory.total > available:
        raise UserError(
            f"--tokens: the conversion needs up to {memory}, expected at most the "
            f"{human_bytes(available)} of {device.type}; fewer tokens or a smaller dtype take less"
        )


def _require_disk(config: DecoderConfig, element_size: int, out: Path) -> None:
    needed = parameter_count(config).total * element_size
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"OUT: the model takes {human_bytes(needed)}, and {parent} has {human_bytes(free)} free"
        )


def _plan(
    config: DecoderConfig, conversion: Conversion, dense: DecoderConfig, memory: Memory
) -> str:
    """What is going to happen, in a few lines."""
    shape = expert_shape(dense, conversion)
    layers = dense.num_layers if conversion.layers is None else len(conversion.layers)
    before, after = parameter_count(dense), parameter_count(config)
    skipped = (shape.num_experts - shape.top_k) * shape.size / dense.dense_dim
    active = before.total + after.router - before.dense * skipped * layers / dense.num_layers
    return (
        f"{layers} of {dense.num_layers} layers: {dense.dense_dim} neurons into "
        f"{shape.num_experts} experts of {shape.size}, {shape.top_k} for a token "
        f"({METHODS[conversion.method].summary})\n"
        f"parameters: {human_count(before.total)}, active {human_count(active)}\n"
        f"memory: at most {memory}"
    )
