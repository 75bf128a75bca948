# SPDX-License-Identifier: Apache-2.0
"""Training goes on from a model file: its loss at the start, its experts, and what does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from nano_task import json_lines
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import cross_entropy

from fomoe.cli import main
from fomoe.errors import UserError
from fomoe.federation.config import Config
from fomoe.federation.task import LanguageModelTask
from fomoe.models import Decoder, configuration, load_model, save_model
from fomoe.nn import initialize, named_tensors

# As a converted model is: unit gates, a router with a bias, a shared expert, and a dense layer.
CONVERTED = replace(
    configuration("tiny"), activation="swiglu", score="unit", router_bias=True, norm="pre",
    shared_expert_dim=8, num_layers=3, dense_layers=(1,), dense_dim=24,
)  # fmt: skip
FEDERATION = {"strategy": "fomoe", "sites": 2, "overlap": 1, "local_steps": 4, "rounds": 2}


@pytest.fixture(scope="module")
def model():
    model = Decoder(CONVERTED)
    initialize(model, seed=3)
    for layer in (model.layers[0], model.layers[2]):
        torch.nn.init.normal_(layer.moe.router.bias)
    return model


def settings(path, *, federation=(), data=(), **model):
    return {
        "model": {"checkpoint": str(path), **model},
        "federation": FEDERATION | dict(federation),
        "training": {"batch_size": 2, "sequence_length": 32},
        "data": {"max_bytes": 100000, "validation_sequences": 4} | dict(data),
    }


def tokenizer_of(word):
    tokenizer = Tokenizer(WordLevel({word: 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer.to_str()


def task(path, **changes):
    return LanguageModelTask(Config.from_dict(settings(path, **changes)))


def test_the_loss_at_the_start_is_the_models_own(model, tmp_path):
    save_model(model, tmp_path)
    ours = task(tmp_path)
    ours.check()
    tokens = ours.batch(0, 0)
    logits = model(tokens[:, :-1]).flatten(0, 1)
    expected = cross_entropy(logits, tokens[:, 1:].flatten())
    assert ours.loss(ours.build_model(None), tokens).language_model == expected


def test_a_site_has_its_residents_of_the_layers_that_have_experts(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors")
    ours = task(tmp_path / "m.safetensors", router="partitioned")
    assert (ours.num_layers, ours.num_experts) == (2, 16)
    assert ours.model_config == replace(CONVERTED, router="partitioned")
    site = ours.build_model([(0, 5), (3,)])
    assert site.training
    assert site.layers[2].moe.experts.expert_ids == (3,)
    whole = dict(named_tensors(model))
    for name, tensor in named_tensors(site):
        assert torch.equal(tensor, whole[name]), name


def test_a_short_run_lowers_the_loss_and_exports_the_same_kind_of_model(model, tmp_path):
    save_model(model, tmp_path / "start")
    config = tmp_path / "config.toml"
    config.write_text("[federation]\nstrategy = 'diloco'\n")
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in settings(tmp_path / "start").items()
        for key, value in values.items()
    ]
    run, optimizer = tmp_path / "run", "optimizer.lr=0.01"
    command = ["train", "--config", str(config), f"run.folder={run}", optimizer, *overrides]
    assert main(command) == 0
    steps = [line for line in json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    losses = [sum(line["losses"]) / 2 for line in steps]
    assert losses[-1] < losses[0] - 0.5
    assert main(["export", str(run), str(tmp_path / "end.safetensors")]) == 0
    assert load_model(tmp_path / "end.safetensors").config == CONVERTED


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"dim": 64}, "model.checkpoint = '.*' fixes the model, so model.dim cannot be set"),
        ({"name": "tiny"}, "so model.checkpoint cannot be set|so model.name cannot be set"),
        ({"vocab_size": 300}, "so model.vocab_size cannot be set as well"),
    ],
)
def test_other_settings_of_the_model_are_refused(tmp_path, beside, message):
    with pytest.raises(UserError, match=message):
        task(tmp_path, **beside)


def test_a_file_that_is_missing_or_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read model .*absent"):
        task(tmp_path / "absent")
    (tmp_path / "m.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"cannot read model .*m\.safetensors"):
        task(tmp_path / "m.safetensors")


def test_data_with_more_tokens_than_the_model_is_refused(tmp_path):
    config = replace(CONVERTED, vocab_size=200)
    save_model(Decoder(config), tmp_path)
    message = "model.checkpoint: vocab_size = 200 is smaller than the 256 tokens"
    with pytest.raises(UserError, match=message):
        task(tmp_path).check()


def test_data_in_other_tokens_than_the_models_is_refused(model, tmp_path):
    save_model(model, tmp_path, {"tokenizer.json": tokenizer_of("a").encode()})
    with pytest.raises(
        UserError, match=r"has tokens of its own: expected data.sources with data.t"
    ):
        task(tmp_path).check()
    other = tmp_path / "other.json"
    other.write_text(tokenizer_of("b"))
    document = json.dumps({"text": "a " * 99})
    (tmp_path / "docs.jsonl").write_text(f"{document}\n" * 40)
    data = {
        "max_bytes": 0, "sources": [{"path": str(tmp_path / "docs.jsonl")}],
        "tokenizer": str(other),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"has tokens of its own: .* got '.*other.json'"):
        task(tmp_path, data=data).check()
    other.write_text(tokenizer_of("a"))
    task(tmp_path, data=data).check()


def test_a_model_without_experts_trains_only_where_every_site_holds_everything(tmp_path):
    config = replace(CONVERTED, dense_layers=(0, 1, 2), shared_expert_dim=0)
    save_model(Decoder(config), tmp_path)
    with pytest.raises(UserError, match="strategy = 'fomoe' needs a model with experts"):
        task(tmp_path).check()
    everywhere = {"strategy": "diloco", "overlap": 2}
    task(tmp_path, federation=everywhere).check()
