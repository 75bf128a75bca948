# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder, read without transformers."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fomoe.errors import UserError
from fomoe.files import cannot
from fomoe.models.files import read_tokenizer_files

__all__ = ["HuggingFaceFolder"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HuggingFaceFolder:
    """``config.json`` beside ``model.safetensors``, or beside the parts that an index names.

    Raises
    ------
    UserError
        When one of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(
                f"{folder}: expected a Hugging Face folder with config.json or a .gguf file"
            )
        self.settings: dict[str, Any] = self._json("config.json")
        self.files = self._files()

    @property
    def tokenizer(self) -> dict[str, bytes]:
        return read_tokenizer_files(self.folder)

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Of every tensor, by name; a name that two files have is refused."""
        shapes: dict[str, list[int]] = {}
        for file in self._opened():
            for name in file.keys():  # noqa: SIM118  it is no dict
                if name in shapes:
                    raise UserError(f"{self.folder} has {name} in two files")
                shapes[name] = file.get_slice(name).get_shape()
        return shapes

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        for file in self._opened():
            for name in file.keys():  # noqa: SIM118  it is no dict
                return file.get_slice(name)[:0].dtype  # type: ignore[no-any-return]
        raise UserError(f"{self.folder} has no weights")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time and one file open at a time."""
        for file in self._opened():
            for name in file.keys():  # noqa: SIM118  it is no dict
                yield name, file.get_tensor(name)

    def _opened(self) -> Iterator[Any]:
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    yield file
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read model {path}: {error}") from error

    def _files(self) -> list[Path]:
        if (self.folder / _SINGLE).is_file():
            return [self.folder / _SINGLE]
        if not (self.folder / _INDEX).is_file():
            raise UserError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}")
        parts = self._json(_INDEX).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
            raise UserError(f"{self.folder / _INDEX} has no weight_map of file names")
        return [self.folder / Path(part).name for part in sorted(set(parts.values()))]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        with cannot(f"read {path}"):
            text = path.read_bytes()
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected an object, got {type(values).__name__}")
        return values
