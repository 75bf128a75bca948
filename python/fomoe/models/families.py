# SPDX-License-Identifier: Apache-2.0
"""The families of models, by the name that files and settings have for them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fomoe.models.decoder import Decoder
from fomoe.models.decoder_config import DecoderConfig
from fomoe.models.foe import FoE, FoEConfig
from fomoe.models.language_model import LanguageModel
from fomoe.models.language_model_config import LanguageModelConfig

__all__ = ["FAMILIES", "build_model", "config_from_dict", "config_to_dict"]

FAMILIES: dict[str, type[LanguageModelConfig]] = {
    config.family: config for config in (DecoderConfig, FoEConfig)
}


def config_to_dict(config: LanguageModelConfig) -> dict[str, Any]:
    """The fields and the ``family`` as JSON-able values, for :func:`config_from_dict`."""
    return {"family": config.family, **config.to_dict()}


def config_from_dict(values: Mapping[str, Any]) -> LanguageModelConfig:
    """The configuration of this ``family`` with these fields.

    Raises
    ------
    ValueError, TypeError
        There is no such family, or a field is unknown, missing or does not fit.
    """
    fields = dict(values)
    family = fields.pop("family", None)
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    return FAMILIES[family].from_dict(fields)


def build_model(
    config: LanguageModelConfig, resident_experts: Sequence[Sequence[int]] | None = None
) -> LanguageModel:
    """The model of a configuration, with random weights.

    Raises
    ------
    ValueError
        ``resident_experts`` do not fit; or the configuration is of no family.
    """
    if isinstance(config, DecoderConfig):
        return Decoder(config, resident_experts)
    if isinstance(config, FoEConfig):
        return FoE(config, resident_experts)
    raise ValueError(f"config: expected one of a model family, got {type(config).__name__}")
