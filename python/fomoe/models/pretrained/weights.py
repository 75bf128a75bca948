# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a Hugging Face model belong in a decoder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fomoe.errors import UserError
from fomoe.models.decoder import Decoder

__all__ = ["copy_weights", "require_fitting", "tensors_by_their_name"]

_MODEL = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "unembedding": "lm_head",
}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "moe_norm": "post_attention_layernorm",
}


def tensors_by_their_name(model: Decoder) -> dict[str, Tensor]:
    """Views of the parameters of a decoder of dense layers, by their names in Hugging Face models.

    The halves of a feed-forward's w1 are its gate_proj and up_proj.
    """
    views: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        module, _, kind = name.rpartition(".")
        if module in _MODEL:
            views[f"{_MODEL[module]}.{kind}"] = value
            continue
        _, layer, part = module.split(".", maxsplit=2)
        prefix = f"model.layers.{layer}"
        if kind == "w1":
            views[f"{prefix}.mlp.gate_proj.weight"], views[f"{prefix}.mlp.up_proj.weight"] = (
                value.chunk(2)
            )
        elif kind == "w2":
            views[f"{prefix}.mlp.down_proj.weight"] = value
        else:
            views[f"{prefix}.{_LAYER[part]}.{kind}"] = value
    return views


def require_fitting(
    model: Decoder, shapes: Mapping[str, Sequence[int]], source: str | Path
) -> None:
    """Compare what is stored with what ``model`` needs, which may be on the meta device.

    Raises
    ------
    UserError
        If a tensor is missing, unexpected or of another shape.
    """
    expected = tensors_by_their_name(model)
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected and not _is_spare(model, name)]
    for problem, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise UserError(f"{source} {problem} {len(names)} weights, first: {names[0]}")
    for name, view in expected.items():
        if tuple(shapes[name]) != tuple(view.shape):
            raise UserError(
                f"{source}: {name} must have shape {tuple(view.shape)}, got {tuple(shapes[name])}"
            )


def copy_weights(model: Decoder, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill ``model`` from tensors that fit it, converting to its dtype."""
    views = tensors_by_their_name(model)
    with torch.no_grad():
        for name, tensor in tensors:
            if name in views:
                views[name].copy_(tensor)


def _is_spare(model: Decoder, name: str) -> bool:
    """Whether a stored tensor says nothing that the model does not know."""
    is_tied = model.config.tie_embeddings and name == "lm_head.weight"
    return is_tied or name.endswith(".rotary_emb.inv_freq")
