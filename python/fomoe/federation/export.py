# SPDX-License-Identifier: Apache-2.0
"""The model that a run's sites have trained in one piece, for fomoe or for transformers."""

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint, holds_checkpoints, read_shards
from fomoe.files import cannot
from fomoe.models import (
    Decoder,
    LanguageModel,
    build_model,
    config_from_dict,
    load_model,
    read_tokenizer_files,
    save_model,
)
from fomoe.models.files import MODEL_FILE
from fomoe.nn import named_tensors

__all__ = ["assemble", "export", "tokenizer_of"]


def export(
    source: Path, out: Path, to: Literal["fomoe", "huggingface", "glm4-moe"] = "fomoe"
) -> None:
    """Write the model of a run, or a model, in the format ``to``.

    Parameters
    ----------
    source : Path
        A run folder, a checkpoint, a model file, or the folder of one.
    out : Path
        A folder, with the tokenizer's files if any are known; for "fomoe", a file if it ends in
        ``.safetensors``.
    to : str
        For :func:`fomoe.models.load_model`, or one of the two formats of
        :func:`fomoe.integrations.transformers.export_huggingface`.

    Raises
    ------
    UserError
        When ``source`` is none of these, ``out`` cannot be written or, for transformers, is there,
        or the format has not a setting of the model.
    """
    if to != "fomoe" and importlib.util.find_spec("transformers") is None:
        raise UserError(f"--format {to}: expected transformers: pip install 'fomoe[hf]'")
    if to != "fomoe" and out.exists():
        raise UserError(f"{out} exists: expected the name of a folder to make")
    if not source.exists():
        raise UserError(f"{source} does not exist: expected a run folder or a model")
    is_run = source.is_dir() and not (source / MODEL_FILE).exists()
    if is_run or holds_checkpoints(source):
        model, tokenizer = assemble(source)
    else:
        model, tokenizer = load_model(source), read_tokenizer_files(source)
    if to == "fomoe":
        save_model(model, out, None if out.suffix == ".safetensors" else tokenizer)
        return
    if not isinstance(model, Decoder):
        raise UserError(
            f"--format {to}: expected a model of the family 'decoder', got {model.config.family!r}"
        )
    from fomoe.integrations.transformers import export_huggingface

    export_huggingface(model, out, tokenizer, "fomoe" if to == "huggingface" else to)


def assemble(run: Path) -> tuple[LanguageModel, dict[str, bytes]]:
    """The model of a run's latest checkpoint, or of a checkpoint, and its tokenizer's files.

    The tokenizer is that of ``model.checkpoint``, else ``data.tokenizer``; none for bytes, or if it
    is no longer there. Takes the memory of the model and of what one site has written of it.

    Raises
    ------
    UserError
        When there is no whole checkpoint, or it is not of a language model.
    """
    checkpoint = Checkpoint(find_checkpoint(run))
    checkpoint.verify()
    try:
        config = config_from_dict(checkpoint.manifest["model"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{checkpoint.folder} is not of a language model: {error}") from error
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    missing = dict(named_tensors(model))
    for record in checkpoint.files:
        if record.kind == "model":
            for name, value in read_shards([checkpoint.folder / record.name]).items():
                missing.pop(name).copy_(value)
    if missing:
        first = min(missing)
        raise UserError(f"{checkpoint.folder} lacks {len(missing)} tensors, first: {first}")
    return model.eval(), _tokenizer_files(checkpoint.manifest["config"])


def tokenizer_of(settings: dict[str, dict[str, Any]]) -> Path | None:
    """A run's tokenizer.json: of ``model.checkpoint``, else ``data.tokenizer``; may be gone."""
    start = settings["model"].get("checkpoint")
    if start is not None and (Path(start) / "tokenizer.json").is_file():
        return Path(start) / "tokenizer.json"
    path = settings["data"]["tokenizer"]
    return Path(path) if path else None


def _tokenizer_files(settings: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    path = tokenizer_of(settings)
    if path is None or not path.is_file():
        return {}
    if path != Path(settings["data"]["tokenizer"]):
        return read_tokenizer_files(path.parent)
    with cannot(f"read data.tokenizer {path}"):
        content = path.read_bytes()
    files = {"tokenizer.json": content}
    # What ends a document in training ends a text.
    separator = settings["data"]["separator"]
    added = json.loads(content).get("added_tokens", [])
    if any(token.get("content") == separator for token in added):
        files["tokenizer_config.json"] = json.dumps({"eos_token": separator}).encode()
    return files
