# SPDX-License-Identifier: Apache-2.0
"""The settings of a Hugging Face ``config.json`` as those of a decoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fomoe.errors import UserError
from fomoe.models.decoder_config import DecoderConfig
from fomoe.models.language_model_config import RopeScaling

__all__ = ["FAMILIES", "Family", "decoder_config"]


class Family(NamedTuple):
    """What tells an architecture from a Llama; all else is the same, the tensors' names, too."""

    qkv_bias: bool = False  # whatever attention_bias says
    attention_bias: bool = False  # may have one, of all four projections
    head_norm: bool = False
    window: str = ""  # "always", "if used" (by use_sliding_window), or none


FAMILIES = {
    "llama": Family(attention_bias=True),
    "mistral": Family(window="always"),
    "qwen2": Family(qkv_bias=True, window="if used"),
    "qwen3": Family(attention_bias=True, head_norm=True, window="if used"),
}
_FIXED: dict[str, tuple[Any, ...]] = {  # the values a decoder can have
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def decoder_config(settings: Mapping[str, Any], source: str | Path) -> DecoderConfig:
    """The decoder with dense layers that is this model.

    Raises
    ------
    UserError
        For an architecture not in ``FAMILIES``, or a setting that a decoder has not.
    """
    architecture = settings.get("model_type")
    if architecture not in FAMILIES:
        raise UserError(
            f"{source}: model_type: expected one of {', '.join(FAMILIES)}, got {architecture!r}"
        )
    for name in _REQUIRED:
        if name not in settings:
            raise UserError(f"{source}: config.json lacks {name}")
    for name, allowed in _FIXED.items():
        value = settings.get(name, allowed[0])
        if value not in allowed:
            raise UserError(f"{source}: {name}: expected {allowed[0]!r}, got {value!r}")
    try:
        return _decoder_config(settings, FAMILIES[architecture])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: config.json does not describe a decoder: {error}") from error


def _decoder_config(settings: Mapping[str, Any], family: Family) -> DecoderConfig:
    num_heads, dim = settings["num_attention_heads"], settings["hidden_size"]
    has_bias = family.attention_bias and bool(settings.get("attention_bias"))
    theta, scaling = _rope(settings)
    return DecoderConfig(
        vocab_size=settings["vocab_size"],
        dim=dim,
        num_layers=settings["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=settings.get("num_key_value_heads") or num_heads,
        head_dim=settings.get("head_dim") or dim // num_heads,
        expert_dim=1,
        num_experts=1,
        top_k=1,
        dense_layers=tuple(range(settings["num_hidden_layers"])),
        dense_dim=settings["intermediate_size"],
        qkv_bias=family.qkv_bias or has_bias,
        attention_output_bias=has_bias,
        head_norm=family.head_norm,
        sliding_window=_window(settings, family),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=settings.get("max_position_embeddings") or 0,
        norm_epsilon=settings.get("rms_norm_eps", 1e-6),
    )


def _rope(settings: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 5 writes ``rope_parameters``; before, scaling was beside ``rope_theta``."""
    parameters = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or settings.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if parameters.get("partial_rotary_factor") not in _FIXED["partial_rotary_factor"]:
        raise ValueError("partial_rotary_factor: expected 1.0")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(parameters["factor"]))
    if kind != "llama3":
        raise ValueError(f"rope_type: expected one of default, linear, llama3, got {kind!r}")
    return theta, RopeScaling(
        kind="llama3",
        factor=float(parameters["factor"]),
        low_frequency_factor=float(parameters["low_freq_factor"]),
        high_frequency_factor=float(parameters["high_freq_factor"]),
        original_context=parameters.get("original_max_position_embeddings")
        or settings["max_position_embeddings"],
    )


def _window(settings: Mapping[str, Any], family: Family) -> int:
    used = family.window == "always" or (family.window and settings.get("use_sliding_window"))
    if not used:
        return 0
    window = settings.get("sliding_window", 4096)  # transformers' default, where it is left out
    if window is not None and family.window == "if used" and settings.get("max_window_layers") != 0:
        raise ValueError("max_window_layers: expected a sliding window in every layer or in none")
    return window or 0
