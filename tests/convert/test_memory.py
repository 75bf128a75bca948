# SPDX-License-Identifier: Apache-2.0
"""The estimate of memory, from shapes."""

from dataclasses import replace

import pytest
import torch

from fomoe.convert.memory import memory_estimate
from fomoe.convert.methods import METHODS
from fomoe.convert.settings import Conversion
from fomoe.models import Decoder, DecoderConfig

LLAMA_3_8B = DecoderConfig(
    vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    expert_dim=1, num_experts=1, top_k=1, dense_layers=tuple(range(32)), dense_dim=14336,
    tie_embeddings=False, rope_theta=5e5,
)  # fmt: skip
BFLOAT16 = 2


@pytest.mark.parametrize("method", METHODS)
def test_llama_3_8b_fits_a_gpu_of_80_gb_with_every_method(method):
    estimate = memory_estimate(LLAMA_3_8B, Conversion(method=method), BFLOAT16)
    assert 16e9 < estimate.total < 80e9


def test_its_weights_are_those_of_the_model_and_a_second_feed_forward():
    with torch.device("meta"):
        model = Decoder(LLAMA_3_8B)
    parameters = sum(p.numel() for p in model.parameters())
    second = sum(p.numel() for layer in model.layers for p in layer.feed_forward.parameters())
    estimate = memory_estimate(LLAMA_3_8B, Conversion(), BFLOAT16)
    assert estimate.weights == BFLOAT16 * (parameters + second)


def test_twice_the_tokens_take_more_and_the_end_to_end_stages_most():
    base = memory_estimate(LLAMA_3_8B, Conversion(), BFLOAT16)
    tokens = memory_estimate(LLAMA_3_8B, replace(Conversion(), tokens=90112), BFLOAT16)
    tuned = memory_estimate(LLAMA_3_8B, replace(Conversion(), fine_tune_steps=1), BFLOAT16)
    assert base.total < tokens.total < tuned.total
