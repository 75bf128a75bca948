# SPDX-License-Identifier: Apache-2.0
"""Model files: one safetensors file, alone or in a folder with the files of its tokenizer.

The tensors have the names of :mod:`fomoe.nn.naming`, each expert its own. The header holds
``fomoe_format_version`` and ``fomoe_model``, the configuration with its family as JSON, so that a
file says by itself how to rebuild its model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fomoe.errors import UserError
from fomoe.files import cannot, write_whole
from fomoe.models.families import build_model, config_from_dict, config_to_dict
from fomoe.models.language_model import LanguageModel
from fomoe.models.language_model_config import LanguageModelConfig
from fomoe.models.parameter_count import parameter_count
from fomoe.nn import named_tensors

__all__ = [
    "MODEL_FILE",
    "MODEL_FORMAT_VERSION",
    "load_model",
    "load_weights",
    "model_file",
    "model_header",
    "read_config",
    "read_tokenizer_files",
    "save_model",
    "stored_dtype",
]

MODEL_FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
TOKENIZER_FILES = (  # and what else text generation needs: where to stop
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def save_model(
    model: LanguageModel, path: str | Path, tokenizer: Mapping[str, bytes] | None = None
) -> None:
    """Write ``model`` so that :func:`load_model` reads an equal one.

    Parameters
    ----------
    model : LanguageModel
        With all its experts.
    path : str or Path
        A file if it ends in ``.safetensors``, else a folder, made if it is missing, for
        ``model.safetensors`` and the tokenizer. Each file is replaced as a whole, the model last.
    tokenizer : Mapping[str, bytes], optional
        Contents by file name, as :func:`read_tokenizer_files` gives them; for a folder only.

    Raises
    ------
    UserError
        When a file cannot be written; a model with experts missing, or a tokenizer for a file.
    """
    path = Path(path)
    tensors = {name: tensor.cpu() for name, tensor in named_tensors(model)}
    if sum(tensor.numel() for tensor in tensors.values()) < parameter_count(model.config).total:
        raise UserError(f"cannot write {path}: expected all experts to be in the model")
    if path.suffix == ".safetensors" and tokenizer:
        raise UserError(f"cannot write {path}: a tokenizer needs a folder to be in")
    file = model_file(path)
    header = model_header(model.config)
    with cannot(f"write {path}"):
        for name, content in (tokenizer or {}).items():
            write_whole(path / name, partial(Path.write_bytes, data=content))
        write_whole(file, partial(save_file, tensors, metadata=header))


def load_model(
    path: str | Path,
    resident_experts: Sequence[Sequence[int]] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """The model in a model file, or in the folder of one, in evaluation mode on the CPU.

    With ``resident_experts`` (ids per layer with experts) only those experts are read and held.
    Weights become ``dtype``, by default what the file has. Takes the memory of the model, and while
    it reads the file's pages, which the system can drop.

    Raises
    ------
    UserError
        When the file cannot be read, is of a newer format, or does not hold the model its header
        describes.
    """
    config = read_config(path)
    if dtype is None:
        dtype = stored_dtype(path)
    with torch.device("meta"):
        model = build_model(config, resident_experts).to(dtype)
    model.to_empty(device="cpu")
    load_weights(model, path)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill the tensors that ``model`` holds from a model file, converting to their dtypes.

    Raises
    ------
    UserError
        When the file cannot be read, or lacks a tensor or has it in another shape.
    """
    with _opened(path) as file, torch.no_grad():
        stored = set(file.keys())
        for name, tensor in named_tensors(model):
            if name not in stored:
                raise UserError(f"{path} lacks {name}, which its header promises")
            value = file.get_tensor(name)
            if value.shape != tensor.shape:
                raise UserError(
                    f"{path}: {name} must have shape {tuple(tensor.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            tensor.copy_(value)


def model_file(path: str | Path) -> Path:
    """Where the tensors are: the file itself, or ``model.safetensors`` in the folder."""
    path = Path(path)
    is_file = path.is_file() or (path.suffix == ".safetensors" and not path.is_dir())
    return path if is_file else path / MODEL_FILE


def model_header(config: LanguageModelConfig) -> dict[str, str]:
    """The header of a file of this model."""
    return {
        "format": "pt",
        "fomoe_format_version": str(MODEL_FORMAT_VERSION),
        "fomoe_model": json.dumps(config_to_dict(config)),
    }


def read_config(path: str | Path) -> LanguageModelConfig:
    """The configuration in the header of a model file, or of the file in a folder.

    Raises
    ------
    UserError
        When the file cannot be read, is of a newer format or no fomoe model.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
    if "fomoe_model" not in header:
        raise UserError(f"{path} has no fomoe model in its header: use fomoe export")
    try:
        version = int(header["fomoe_format_version"])
        if version > MODEL_FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}; "
                f"this fomoe reads up to {MODEL_FORMAT_VERSION}"
            )
        return config_from_dict(json.loads(header["fomoe_model"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: the header does not describe a fomoe model: {error}") from error


def read_tokenizer_files(folder: str | Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder by name, among them ``tokenizer.json``; none for a file.

    Raises
    ------
    UserError
        When one cannot be read.
    """
    paths = [Path(folder) / name for name in TOKENIZER_FILES]
    with cannot(f"read the tokenizer in {folder}"):
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def stored_dtype(path: str | Path) -> torch.dtype:
    """Of a model file's embedding, which every model has.

    Raises
    ------
    UserError
        When the file cannot be read, or has none.
    """
    with _opened(path) as file:
        if "embedding.weight" not in file.keys():  # noqa: SIM118  it is no dict
            raise UserError(f"{path} lacks embedding.weight, which its header promises")
        return file.get_slice("embedding.weight")[:0].dtype  # type: ignore[no-any-return]


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        with safe_open(model_file(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read model {path}: {error}") from error
