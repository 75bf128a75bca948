# SPDX-License-Identifier: Apache-2.0
"""Reading a model file that ``fomoe export`` wrote."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fomoe.errors import UserError
from fomoe.models.decoder import Decoder, DecoderConfig
from fomoe.nn import named_tensors

__all__ = ["load_model"]


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
            settings = (file.metadata() or {}).get("fomoe_model")
            if settings is None:
                raise UserError(f"{path} has no fomoe model in its header: use fomoe export")
            model = Decoder(DecoderConfig(**json.loads(settings)), resident_experts)
            with torch.no_grad():
                for name, tensor in named_tensors(model):
                    tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read model {path}: {error}") from error
    return model.eval()
