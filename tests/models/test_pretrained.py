# SPDX-License-Identifier: Apache-2.0
"""Reading dense models: one file or several, GGUF, and what is refused before a weight is read."""

import json

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fomoe.errors import UserError
from fomoe.models import load_model, save_model
from fomoe.models.pretrained import load_dense

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def folder_of(llama, path, changes=None, tensors=None, tokenizer=None):
    """The model's folder, with other settings, or what is done to its tensors."""
    llama.save_pretrained(path)
    settings = json.loads((path / "config.json").read_text()) | (changes or {})
    (path / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        stored = load_file(path / "model.safetensors")
        tensors(stored)
        save_file(stored, path / "model.safetensors")
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def test_a_folder_in_parts_is_the_same_model_as_in_one_file(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = load_dense(tmp_path)
    whole, _ = load_dense(folder_of(llama, tmp_path / "whole"))
    assert torch.equal(model(TOKENS), whole(TOKENS))
    torch.testing.assert_close(model(TOKENS), llama(TOKENS).logits)


def test_weights_become_the_dtype_asked_for(llama, tmp_path):
    folder = folder_of(llama, tmp_path)
    model, _ = load_dense(folder, dtype=torch.bfloat16)
    expected = llama.model.embed_tokens.weight.bfloat16()
    assert torch.equal(model.embedding.weight, expected)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_folder_as_transformers_4_wrote_it(llama, tmp_path):
    changes = {
        "rope_parameters": None, "rope_theta": 123.0,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    }  # fmt: skip
    config = load_dense(folder_of(llama, tmp_path, changes))[0].config
    assert config.rope_theta == 123.0
    assert config.rope_scaling.kind == "linear"
    assert config.rope_scaling.factor == 3.0


def test_model_and_tokenizer_go_on_into_a_folder_of_ours(llama, tmp_path):
    vocabulary = {"model": {"vocab": {"a": 0, "b": 60}}}
    folder = folder_of(llama, tmp_path / "theirs", tokenizer=vocabulary)
    model, tokenizer = load_dense(folder)
    save_model(model, tmp_path / "ours", tokenizer)
    assert torch.equal(load_model(tmp_path / "ours")(TOKENS), model(TOKENS))
    assert json.loads((tmp_path / "ours" / "tokenizer.json").read_text()) == vocabulary


def drop(name):
    return lambda stored: stored.pop(name)


def put(name, *shape):
    return lambda stored: stored.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type: expected one of llama, mistral, qwen2, qwen3, got 'gemma'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected None, got "),
        ({"num_key_value_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type: expected one of default, linear, llama3, got 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "does not describe a decoder: 'low_freq_factor'",
        ),
        (
            {
                "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1,
                "sliding_window": 4,
            },
            "a sliding window in every layer or in none",
        ),
        ({"vocab_size": 62}, r"embed_tokens.weight must have shape \(62, 32\), got \(61, 32\)"),
        ({"num_hidden_layers": 3}, "lacks 9 weights, first: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has unexpected 9 weights, first: model.layers.1."),
    ],
)  # fmt: skip
def test_settings_that_a_decoder_has_not_are_refused(llama, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_dense(folder_of(llama, tmp_path, changes))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (drop("lm_head.weight"), "lacks 1 weights, first: lm_head.weight"),
        (
            put("model.layers.1.self_attn.q_proj.bias", 32),
            "has unexpected 1 weights, first: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            put("model.layers.0.mlp.up_proj.weight", 21, 32),
            r"up_proj.weight must have shape \(20, 32\), got \(21, 32\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(llama, tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        load_dense(folder_of(llama, tmp_path, tensors=tensors))


def test_the_unembedding_of_a_tied_model_and_old_buffers_are_left_aside(llama, tmp_path):
    changes = {"tie_word_embeddings": True}
    buffers = put("model.layers.0.self_attn.rotary_emb.inv_freq", 4)
    model, _ = load_dense(folder_of(llama, tmp_path, changes, buffers))
    assert model.config.tie_embeddings


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"model": {"vocab": {"a": 61}}}, "has 62 tokens, but the model's vocabulary is 61"),
        ({"model": {"vocab": [["a", 0.0]] * 62}}, "has 62 tokens"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": 99}]}, "has 100 tokens"),
        ({"vocab": []}, "tokenizer.json is no tokenizer"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(llama, tmp_path, tokenizer, message):
    with pytest.raises(UserError, match=message):
        load_dense(folder_of(llama, tmp_path, tokenizer=tokenizer))


def test_a_source_that_is_none_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match=r"expected a Hugging Face folder with config.json or a"):
        load_dense(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot read .*config.json: No such file"):
        load_dense(tmp_path)
    folder = folder_of(llama, tmp_path / "llama")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read model .*model.safetensors"):
        load_dense(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.ind"):
        load_dense(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object, got list"):
        load_dense(folder)


def gguf_of(llama, path):
    """A GGUF file of the model in float32, in llama.cpp's order of rotary pairs, with a tokenizer
    of 61 tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(20)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(61)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *(chr(33 + i) for i in range(59)), '!"'])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in llama.state_dict().items():
        value = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                halves = value.reshape(heads, 2, value.shape[0] // heads // 2, 32)
                value = numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        for theirs, short in names.items():
            name = name.replace(theirs, short)
        name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd")
        name = name.replace("model.norm", "output_norm").replace("lm_head", "output")
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_and_tokenizer_that_transformers_reads(llama, tmp_path):
    path = gguf_of(llama, tmp_path / "tiny.gguf")
    model, tokenizer = load_dense(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits)
    torch.testing.assert_close(model(TOKENS), llama(TOKENS).logits)
    assert len(json.loads(tokenizer["tokenizer.json"])["model"]["vocab"]) == 61


def test_a_gguf_file_that_is_damaged_or_one_of_several_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*a.gguf"):
        load_dense(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"has 2 GGUF files: name one, such as .*a.gguf"):
        load_dense(tmp_path)
