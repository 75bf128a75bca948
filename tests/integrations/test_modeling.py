# SPDX-License-Identifier: Apache-2.0
"""What is exported for transformers is the same model there: logits, loss, generation, files."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from fomoe.errors import UserError
from fomoe.integrations.transformers import FomoeConfig, FomoeForCausalLM, export_huggingface
from fomoe.models import Decoder, configuration
from fomoe.nn import auxiliary_loss, initialize, named_tensors

TOKENS = torch.arange(24).view(2, 12)
CONVERTED = replace(
    configuration("tiny"), activation="swiglu", score="unit", router_bias=True, norm="pre",
    shared_expert_dim=8, num_layers=3, dense_layers=(1,), dense_dim=24, tie_embeddings=False,
)  # fmt: skip
CONFIGURATIONS = {"tiny": configuration("tiny"), "converted": CONVERTED}


def decoder(name="converted"):
    model = Decoder(CONFIGURATIONS[name]).eval()
    initialize(model, seed=0)
    return model


@pytest.fixture
def exported(tmp_path):
    model = decoder()
    export_huggingface(model, tmp_path / "hf", {})
    return model, AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_exported_model_has_the_same_logits_through_auto_classes(name, tmp_path):
    model = decoder(name)
    export_huggingface(model, tmp_path / "hf", {})
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert isinstance(config, FomoeConfig)
    assert config.decoder_config() == model.config
    assert (config.vocab_size, config.hidden_size) == (256, 64)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(read, FomoeForCausalLM)
    assert torch.equal(read(TOKENS).logits, model(TOKENS))
    assert torch.equal(read(TOKENS, logits_to_keep=1).logits, model(TOKENS)[:, -1:])

    read.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    torch.testing.assert_close(again(TOKENS).logits, model.double()(TOKENS))


def test_a_fresh_model_is_random_and_whole():
    model = AutoModelForCausalLM.from_config(FomoeConfig(fomoe_model=CONVERTED.to_dict()))
    assert model(TOKENS).logits.std() > 0.1


def test_greedy_generation_is_the_loop_over_arg_max(exported):
    model, read = exported
    tokens = TOKENS
    for _ in range(5):
        following = model(tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    generated = read.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=255)
    assert torch.equal(generated, tokens)


def test_a_cache_and_padding_on_the_left_are_refused(exported):
    _, read = exported
    with pytest.raises(ValueError, match="expected use_cache=False, as there is no cache"):
        read.generate(TOKENS, max_new_tokens=2, use_cache=True)
    mask = torch.ones_like(TOKENS)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="expected padding on the right"):
        read(TOKENS, attention_mask=mask)
    mask = mask.flip(1)
    assert torch.equal(read(TOKENS, attention_mask=mask).logits, read(TOKENS).logits)
    with pytest.raises(NotImplementedError, match="vocabulary cannot be resized"):
        read.resize_token_embeddings(300)


def test_the_loss_is_the_cross_entropy_and_in_training_the_routers_loss_as_well(exported):
    model, read = exported
    expected = F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(read(TOKENS, labels=TOKENS).loss, expected)
    read.train()
    loss = read(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss, expected + auxiliary_loss(model))


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(exported):
    _, read = exported
    read.train()
    gradients, kept = [], []
    for enabled in (False, True):
        if enabled:
            read.activation_checkpointing_enable()
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.nbytes)
            return tensor

        read.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = read(TOKENS, labels=TOKENS).loss
        kept.append(sum(saved))
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in read.named_parameters()})
    assert kept[1] < kept[0] / 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_tokenizer_and_generation_settings_come_along_without_a_cache(tmp_path):
    files = {
        "tokenizer.json": b"{}",
        "generation_config.json": json.dumps({"eos_token_id": 7, "use_cache": True}).encode(),
    }
    export_huggingface(decoder(), tmp_path / "hf", files)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert read.generation_config.eos_token_id == 7
    assert read.generation_config.use_cache is False
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == b"{}"


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="exists: expected the name of a folder to make"):
        export_huggingface(decoder(), tmp_path, {})


def test_weights_that_are_missing_are_reported_and_drawn(tmp_path, exported):
    _, read = exported
    state = {n: v for n, v in read.state_dict().items() if "w1" not in n and "norm" not in n}
    partial = FomoeForCausalLM.from_pretrained(None, config=read.config, state_dict=state)
    names = {name for name, _ in named_tensors(partial.model)}
    assert {name for name, _ in named_tensors(read.model)} == names
    assert torch.equal(partial.model.norm.weight, torch.ones(64))
    assert 0.5 < partial.model.layers[0].moe.experts.w1.std() * 8 < 2
