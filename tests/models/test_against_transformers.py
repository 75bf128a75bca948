# SPDX-License-Identifier: Apache-2.0
"""The Llama, Qwen2, Qwen3 and Mistral of transformers, read from a folder, compute the same.

Tiny random models, in float64 throughout: transformers computes norms, softmax and angles in
float32 by name, so the tests let that name mean float64. Tolerance: logits within 1e-9.
"""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fomoe.models.pretrained import load_dense

TOLERANCE = 1e-9
SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "attn_implementation": "eager", "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True},
    "llama 3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama, linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None},
}  # fmt: skip


@contextlib.contextmanager
def float32_means_float64(monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        yield


def theirs(settings):
    """A random model, in which biases and norms are random, too."""
    torch.manual_seed(0)
    settings = SHAPE | settings
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) / (1 if "bias" in name else 3))
            parameter.add_("norm" in name)
    return model


@pytest.mark.parametrize("name", CASES)
def test_what_load_dense_reads_is_the_model_of_transformers(name, monkeypatch, tmp_path):
    tokens = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(1))
    with float32_means_float64(monkeypatch), torch.no_grad():
        model = theirs(CASES[name])
        expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    decoder, _ = load_dense(tmp_path)
    assert decoder.embedding.weight.dtype == torch.float64
    assert expected.std() > 0.1
    torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=TOLERANCE)
