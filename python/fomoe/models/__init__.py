# SPDX-License-Identifier: Apache-2.0
"""Language models built from :class:`fomoe.nn.MoE`, and named shapes of them."""

from fomoe.models.configurations import CONFIGURATIONS, configuration
from fomoe.models.decoder import Decoder
from fomoe.models.decoder_config import DecoderConfig, RopeScaling
from fomoe.models.feed_forward import FeedForward
from fomoe.models.files import (
    MODEL_FORMAT_VERSION,
    load_model,
    load_weights,
    read_config,
    read_tokenizer_files,
    save_model,
)
from fomoe.models.parameter_count import ParameterCount, parameter_count

__all__ = [
    "CONFIGURATIONS",
    "MODEL_FORMAT_VERSION",
    "Decoder",
    "DecoderConfig",
    "FeedForward",
    "ParameterCount",
    "RopeScaling",
    "configuration",
    "load_model",
    "load_weights",
    "parameter_count",
    "read_config",
    "read_tokenizer_files",
    "save_model",
]
