# SPDX-License-Identifier: Apache-2.0
"""Tiny random models with the vocabulary of bytes, as folders of Hugging Face."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fomoe.convert.dense import DenseLayer, DenseWeights

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Folder of each family's model: 3 layers, width 24, feed-forward 48, in float64."""
    folders = {}
    for family, settings in FAMILIES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, vocab_size=256, hidden_size=24, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
            initializer_range=0.2, bos_token_id=None, eos_token_id=None, **settings,
        )  # fmt: skip
        folders[family] = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(
            folders[family]
        )
    return folders


@pytest.fixture
def layer():
    """A random layer of 24 neurons in float64 with inputs of 64 tokens."""
    return random_layer(0)


def random_layer(seed, *, num_tokens=64, dim=8, num_neurons=24):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = DenseWeights(draw(num_neurons, dim), draw(num_neurons, dim), draw(dim, num_neurons))
    return DenseLayer(weights, draw(num_tokens, dim))
