# SPDX-License-Identifier: Apache-2.0
"""A model to generate with: of `fomoe export` or `fomoe convert`, or a run of `fomoe train`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.models import (
    LanguageModel,
    LanguageModelConfig,
    build_model,
    config_from_dict,
    load_weights,
    read_config,
)
from fomoe.models.files import stored_dtype
from fomoe.nn import named_tensors

__all__ = ["Opening"]


class Opening(NamedTuple):
    """What is known of a model before its weights are read.

    ``folder`` is where its tokenizer is; ``tokenizer`` names another one.
    """

    path: Path
    config: LanguageModelConfig
    folder: Path
    tokenizer: Path | None = None
    checkpoint: Checkpoint | None = None

    @classmethod
    def of(cls, path: Path) -> "Opening":
        """Look at a model file, a folder with one, or the folder of a run.

        Raises
        ------
        UserError
            It is none of these, or of another family.
        """
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not (path / "checkpoints").is_dir() and not (path / "manifest.json").is_file():
            return cls(path, read_config(path), path if path.is_dir() else path.parent)
        checkpoint = Checkpoint(find_checkpoint(path))
        try:
            config = config_from_dict(checkpoint.manifest["model"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is not the run of a language model: {error}") from error
        tokenizer = checkpoint.manifest["config"]["data"]["tokenizer"]
        return cls(path, config, path, Path(tokenizer) if tokenizer else None, checkpoint)

    def load(
        self,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        build: Callable[[LanguageModelConfig], LanguageModel] = build_model,
    ) -> LanguageModel:
        """What ``build`` makes of it, in evaluation mode.

        Weights become ``dtype``, or stay what they are.
        """
        if self.checkpoint is None:
            with torch.device("meta"):
                model = build(self.config).to(dtype or stored_dtype(self.path))
            model.to_empty(device=device)
            load_weights(model, self.path)
            return model.eval()
        self.checkpoint.verify()
        values = self.checkpoint.model()
        stored = {value.dtype for value in values.values()}
        with torch.device("meta"):
            model = build(self.config).to(dtype or stored.pop())
        model.to_empty(device=device)
        with torch.no_grad():
            for name, tensor in named_tensors(model):
                tensor.copy_(values[name])
        return model.eval()
