# SPDX-License-Identifier: Apache-2.0
"""Reading a model file that ``fomoe export`` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fomoe.errors import UserError
from fomoe.models.decoder import Decoder
from fomoe.models.decoder_config import DecoderConfig
from fomoe.nn import named_tensors

__all__ = ["MODEL_FORMAT_VERSION", "load_model"]

MODEL_FORMAT_VERSION = 1


def load_model(
    path: str | Path, resident_experts: Sequence[Sequence[int]] | None = None
) -> Decoder:
    """The decoder in a safetensors file of ``fomoe export``, in evaluation mode.

    With ``resident_experts`` (ids per layer) only those experts are read and held.

    Raises
    ------
    UserError
        When the file cannot be read or was not written by ``fomoe export``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = _config(path, file.metadata() or {})
            model = Decoder(config, resident_experts)
            with torch.no_grad():
                for name, tensor in named_tensors(model):
                    value = file.get_tensor(name)
                    if value.shape != tensor.shape:
                        raise UserError(
                            f"{path}: {name} must have shape {tuple(tensor.shape)}, "
                            f"got {tuple(value.shape)}"
                        )
                    tensor.copy_(value)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read model {path}: {error}") from error
    return model.eval()


def _config(path: str | Path, header: dict[str, str]) -> DecoderConfig:
    if "fomoe_model" not in header:
        raise UserError(f"{path} has no fomoe model in its header: use fomoe export")
    try:
        version = int(header["fomoe_format_version"])
        if version > MODEL_FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}; "
                f"this fomoe reads up to {MODEL_FORMAT_VERSION}"
            )
        return DecoderConfig.from_dict(json.loads(header["fomoe_model"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: the header does not describe a fomoe model: {error}") from error
