# SPDX-License-Identifier: Apache-2.0
"""Decoders with dense layers are the Llama, Qwen2, Qwen3 and Mistral of transformers.

Tiny random models, in float64 throughout: transformers computes norms, softmax and angles in
float32 by name, so the tests let that name mean float64. Tolerance: logits within 1e-9.
"""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fomoe.models import Decoder, DecoderConfig, RopeScaling

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
    "llama": ({"model_type": "llama"}, {"tie_embeddings": False}),
    "llama, tied": ({"model_type": "llama", "tie_word_embeddings": True}, {}),
    "llama, biases": (
        {"model_type": "llama", "attention_bias": True},
        {"tie_embeddings": False, "qkv_bias": True, "attention_output_bias": True},
    ),
    "llama 3.1": (
        {"model_type": "llama", "rope_parameters": LLAMA3},
        {
            "tie_embeddings": False,
            "rope_theta": 500.0,
            "rope_scaling": RopeScaling(
                kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
                original_context=16,
            ),
        },
    ),
    "llama, linear": (
        {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        },
        {"tie_embeddings": False, "rope_scaling": RopeScaling(kind="linear", factor=2.5)},
    ),
    "qwen2": ({"model_type": "qwen2"}, {"tie_embeddings": False, "qkv_bias": True}),
    "qwen3": ({"model_type": "qwen3"}, {"tie_embeddings": False, "head_norm": True}),
    "mistral": (
        {"model_type": "mistral", "sliding_window": 5},
        {"tie_embeddings": False, "sliding_window": 5},
    ),
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


def ours(model, settings):
    config = DecoderConfig(
        vocab_size=61, dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=6,
        expert_dim=1, num_experts=1, top_k=1, dense_layers=(0, 1), dense_dim=20, norm_epsilon=1e-5,
        **settings,
    )  # fmt: skip
    decoder = Decoder(config).double()
    state = model.state_dict()
    names = {
        "embedding": "model.embed_tokens", "unembedding": "lm_head", "norm": "model.norm",
        "attention_norm": "input_layernorm", "moe_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
    }  # fmt: skip
    for name, parameter in decoder.named_parameters():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("layers."):
            layer = ".".join(stem.split(".")[:2])
            part = stem.removeprefix(f"{layer}.")
            if kind == "w1":
                gate, up = (state.pop(f"model.{layer}.mlp.{p}_proj.weight") for p in ("gate", "up"))
                parameter.data.copy_(torch.cat([gate, up]))
                continue
            part = "mlp.down_proj" if kind == "w2" else names[part]
            kind = "weight" if kind == "w2" else kind
            parameter.data.copy_(state.pop(f"model.{layer}.{part}.{kind}"))
        else:
            parameter.data.copy_(state.pop(f"{names[stem]}.{kind}"))
    if config.tie_embeddings:
        state.pop("lm_head.weight")
    assert not state
    return decoder


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_of_dense_layers_is_the_model_of_transformers(name, monkeypatch):
    their_settings, our_settings = CASES[name]
    tokens = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(1))
    with float32_means_float64(monkeypatch), torch.no_grad():
        model = theirs(their_settings)
        expected = model(tokens).logits
    logits = ours(model, our_settings)(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
