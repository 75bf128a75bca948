# SPDX-License-Identifier: Apache-2.0
"""A GGUF file, de-quantised by transformers."""

import importlib.util
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe.errors import UserError
from fomoe.models.files import read_tokenizer_files

__all__ = ["GgufFile", "find_gguf"]


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that ``source`` is, or that is the only model in it; else None.

    Raises
    ------
    UserError
        When a folder without ``config.json`` has several.
    """
    if source.suffix == ".gguf" and source.is_file():
        return source
    if not source.is_dir() or (source / "config.json").exists():
        return None
    found = sorted(source.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(f"{source} has {len(found)} GGUF files: name one, such as {found[0]}")
    return found[0] if found else None


class GgufFile:
    """Settings and tokenizer are read at once, weights when they are asked for.

    Raises
    ------
    UserError
        When transformers cannot read the file, or is missing.
    """

    dtype = torch.float32  # of what transformers makes of them

    def __init__(self, path: Path) -> None:
        for package in ("transformers", "gguf"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{path}: GGUF takes {package}: pip install 'fomoe[hf]'")
        from transformers import AutoConfig, AutoTokenizer

        self.path = path
        self.settings: dict[str, Any] = self._read(AutoConfig).to_dict()
        with tempfile.TemporaryDirectory() as folder:
            self._read(AutoTokenizer).save_pretrained(folder)
            self.tokenizer = read_tokenizer_files(folder)

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self._state.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, each forgotten once it is given: a second call gives none."""
        for name in list(self._state):
            yield name, self._state.pop(name)

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        from transformers import AutoModelForCausalLM

        return dict(self._read(AutoModelForCausalLM, dtype=self.dtype).state_dict())

    def _read(self, auto: Any, **options: Any) -> Any:
        try:
            return auto.from_pretrained(
                self.path.parent, gguf_file=self.path.name, local_files_only=True, **options
            )
        except Exception as error:  # whatever is wrong with the file, as transformers finds it
            reason = str(error).partition("\n")[0]
            raise UserError(f"cannot read {self.path}: {reason}") from error
