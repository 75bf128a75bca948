# SPDX-License-Identifier: Apache-2.0
"""Language models built from :class:`fomoe.nn.MoE`, and named shapes of them."""

from fomoe.models.configurations import CONFIGURATIONS, configuration
from fomoe.models.decoder import Decoder
from fomoe.models.decoder_config import DecoderConfig
from fomoe.models.families import FAMILIES, build_model, config_from_dict, config_to_dict
from fomoe.models.feed_forward import FeedForward
from fomoe.models.files import (
    MODEL_FORMAT_VERSION,
    load_model,
    load_weights,
    read_config,
    read_tokenizer_files,
    save_model,
)
from fomoe.models.foe import FoE, FoEConfig
from fomoe.models.language_model import LanguageModel
from fomoe.models.language_model_config import LanguageModelConfig, RopeScaling
from fomoe.models.parameter_count import ParameterCount, parameter_count

__all__ = [
    "CONFIGURATIONS",
    "FAMILIES",
    "MODEL_FORMAT_VERSION",
    "Decoder",
    "DecoderConfig",
    "FeedForward",
    "FoE",
    "FoEConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "ParameterCount",
    "RopeScaling",
    "build_model",
    "config_from_dict",
    "config_to_dict",
    "configuration",
    "load_model",
    "load_weights",
    "parameter_count",
    "read_config",
    "read_tokenizer_files",
    "save_model",
]
