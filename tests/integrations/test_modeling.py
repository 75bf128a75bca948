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
    torch.testing.assert_close(read(TOKENS, logits_to_keep=1).logits, model(TOKENS)[:, -1:])

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


@pytest.mark.parametrize("window", [0, 4])
def test_tokens_after_a_cache_have_the_logits_of_all_at_once(window):
    config = replace(CONVERTED, sliding_window=window)
    read = FomoeForCausalLM(FomoeConfig(fomoe_model=config.to_dict())).double().eval()
    whole = read(TOKENS)
    assert whole.past_key_values is None
    first = read(TOKENS[:, :5], use_cache=True)
    rest = read(TOKENS[:, 5:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 13\)"):
        read(
            TOKENS[:, :1],
            attention_mask=torch.ones_like(TOKENS),
            past_key_values=rest.past_key_values,
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side, exported):
    _, read = exported
    read = read.double()
    padding = torch.full((1, 3), 9)
    short = TOKENS[:1, :9]
    parts = [padding, short] if side == "left" else [short, padding]
    here = slice(3, None) if side == "left" else slice(0, 9)
    mask = torch.ones_like(TOKENS)
    mask[0] = torch.cat([torch.full_like(part, part is short) for part in parts], 1)
    logits = read(torch.cat([torch.cat(parts, 1), TOKENS[1:]]), attention_mask=mask).logits
    torch.testing.assert_close(logits[0, here], read(short).logits[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[1], read(TOKENS[1:]).logits[0], rtol=0, atol=1e-10)


def test_unequal_prompts_generate_together_what_they_do_alone(exported):
    _, read = exported
    read = read.double()
    padded = TOKENS.clone()
    padded[0, :3] = 9
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "pad_token_id": 255, "num_beams": 2, "do_sample": False}
    together = read.generate(padded, attention_mask=mask, **options)
    for row, prompt in ((0, TOKENS[:1, 3:]), (1, TOKENS[1:])):
        alone = read.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        uncached = read.generate(
            prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options
        )
        assert torch.equal(alone, uncached)
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_the_vocabulary_cannot_be_resized(exported):
    with pytest.raises(NotImplementedError, match="vocabulary cannot be resized"):
        exported[1].resize_token_embeddings(300)


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


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    files = {
        "tokenizer.json": b"{}",
        "generation_config.json": json.dumps({"eos_token_id": 7}).encode(),
    }
    export_huggingface(decoder(), tmp_path / "hf", files)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert read.generation_config.eos_token_id == 7
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == b"{}"


def test_generation_settings_that_transformers_would_not_write_are_copied(tmp_path):
    stored = json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7}).encode()
    export_huggingface(decoder(), tmp_path / "hf", {"generation_config.json": stored})
    assert (tmp_path / "hf" / "generation_config.json").read_bytes() == stored
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert read.generation_config.eos_token_id == 7


def test_positions_are_those_of_the_mask_or_refused(exported):
    _, read = exported
    places = torch.arange(12).expand(2, 12)
    expected = read(TOKENS).logits
    assert torch.equal(read(TOKENS, position_ids=places).logits, expected)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    read(TOKENS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, 1))
    with pytest.raises(ValueError, match=r"position_ids: .* packed sequences"):
        read(TOKENS, position_ids=places % 6)
    with pytest.raises(ValueError, match="position_ids: "):
        read(TOKENS, attention_mask=mask, position_ids=places)


def test_what_the_model_cannot_do_is_refused(exported):
    _, read = exported
    with pytest.raises(ValueError, match="output_hidden_states"):
        read(TOKENS, output_hidden_states=True)
    with pytest.raises(ValueError, match="expected a DynamicCache, got StaticCache"):
        read.generate(TOKENS, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_a_cache_is_left_out_where_layers_run_twice(exported):
    _, read = exported
    read.train()
    read.activation_checkpointing_enable()
    output = read(TOKENS, labels=TOKENS, use_cache=True)
    output.loss.backward()
    assert output.past_key_values is None


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
