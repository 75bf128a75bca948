# SPDX-License-Identifier: Apache-2.0
"""A model to generate with: of `fomoe export` or `fomoe convert`, or a run of `fomoe train`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint, holds_checkpoints
from fomoe.federation.export import tokenizer_of
from fomoe.models import (
    DecoderConfig,
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


def without_capacity(config: LanguageModelConfig) -> LanguageModelConfig:
    """What a text is must not depend on what is beside it: no expert drops a token."""
    if isinstance(config, DecoderConfig):
        return replace(config, capacity_factor=None)
    return config


class Opening(NamedTuple):
    """What is known of a model before its weights are read.

    ``folder`` is where its tokenizer is; ``tokenizer`` names another one. ``separator`` ended the
    documents of its training.
    """

    path: Path
    config: LanguageModelConfig
    folder: Path
    tokenizer: Path | None = None
    checkpoint: Checkpoint | None = None
    separator: str = ""

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
        if not holds_checkpoints(path):
            config = without_capacity(read_config(path))
            return cls(path, config, path if path.is_dir() else path.parent)
        checkpoint = Checkpoint(find_checkpoint(path))
        try:
            config = config_from_dict(checkpoint.manifest["model"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is not the run of a language model: {error}") from error
        settings = checkpoint.manifest["config"]
        return cls(
            path,
            without_capacity(config),
            path,
            tokenizer_of(settings),
            checkpoint,
            settings["data"]["separator"],
        )

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
        self.checkpoint.verify("model")
        with torch.device("meta"):
            model = build(self.config)
        values = self.checkpoint.model({name for name, _ in named_tensors(model)})
        model.to(dtype or next(iter(values.values())).dtype).to_empty(device=device)
        with torch.no_grad():
            for name, tensor in named_tensors(model):
                tensor.copy_(values[name])
        return model.eval()
