# SPDX-License-Identifier: Apache-2.0
"""`fomoe train` with a Federation of Experts, and what of it is refused."""

import io
import json

import pytest
from foe_ranks import CONFIG

from fomoe.cli import main
from fomoe.errors import UserError
from fomoe.federation.config import Config
from fomoe.federation.task import LanguageModelTask
from fomoe.generate import Sampling
from fomoe.generate.command import Request, run
from fomoe.models import FoEConfig, load_model, read_config

MODEL = {"family": "foe", "dim": 32, "num_layers": 2, "expert_dim": 24, "top_k": 4}


def test_two_sites_train_one_export_it_and_generate(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        "[model]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in MODEL.items())
        + """
        [federation]
        strategy = "fomoe"
        sites = 2
        overlap = 1
        local_steps = 8
        rounds = 3
        [optimizer]
        lr = 0.01
        [training]
        batch_size = 4
        sequence_length = 32
        [data]
        max_bytes = 100000
        validation_sequences = 8
        """
    )  # fmt: skip
    folder, out = tmp_path / "run", tmp_path / "foe.safetensors"
    assert main(["train", "--config", str(config), f"run.folder={folder}"]) == 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [sum(line["losses"]) / 2 for line in metrics if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 1
    ghosts = [line["ghost_share"] for line in metrics if line["kind"] == "round"]
    assert ghosts[-1] == pytest.approx(0.5, abs=0.1)

    assert main(["export", str(folder), str(out)]) == 0
    assert isinstance(read_config(out), FoEConfig)
    texts = []
    for path in (out, folder):
        written = io.StringIO()
        run(
            Request(checkpoint=path, prompts=["The "], max_new_tokens=8, sampling=Sampling()),
            written,
            io.StringIO(),
        )
        texts.append(written.getvalue())
    assert texts[0] == texts[1]
    assert texts[0].startswith("The ")
    command = ["export", str(out), str(tmp_path / "hf"), "--format", "huggingface"]
    assert main(command) == 2


def test_a_run_goes_on_from_a_model_file(tmp_path):
    from fomoe.models import FoE, save_model
    from fomoe.nn import initialize, named_tensors

    model = FoE(CONFIG)
    initialize(model, seed=5)
    save_model(model, tmp_path / "m.safetensors")
    settings = {"model": {"checkpoint": str(tmp_path / "m.safetensors")}, "federation": ONE_SITE}
    site = LanguageModelTask(Config.from_dict(settings)).build_model([(0, 5), (), (3,)])
    whole = dict(named_tensors(load_model(tmp_path / "m.safetensors")))
    for name, tensor in named_tensors(site):
        assert (tensor == whole[name]).all(), name


ONE_SITE = {"strategy": "diloco", "sites": 1}


@pytest.mark.parametrize(
    ("model", "federation", "sentence"),
    [
        ({"num_experts": 6}, {}, "model.num_experts: expected a multiple of the num_kv_heads = 4"),
        ({"top_k": 2}, {}, "model.top_k: expected a multiple of the num_kv_heads = 4 groups"),
        ({"router": "partitioned"}, {}, "model.family = 'foe' has no setting model.router"),
        ({"dense_dim": 4}, {}, "model.family = 'foe' has no setting model.dense_dim"),
        ({"score": "sigmoid", "softmax_over": "all"}, {}, "model.softmax_over: expected 'group'"),
        ({"family": "decoder", "softmax_over": "all"}, {},
         "model.family = 'decoder' has no setting model.softmax_over"),
        ({}, {"strategy": "ep", "sites": 2}, "federation.strategy = 'ep' needs a model of the"),
        ({}, {"ranks_per_site": 2, "spread_experts": True},
         "federation.spread_experts needs a model of the family 'decoder', got 'foe'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(model, federation, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        LanguageModelTask(
            Config.from_dict({"model": MODEL | model, "federation": ONE_SITE | federation})
        ).check()


def test_a_named_one_has_no_router_to_set():
    settings = {"model": {"name": "foe-1b", "router": "full"}, "federation": ONE_SITE}
    with pytest.raises(UserError, match="a model of the family 'foe' has no such setting"):
        LanguageModelTask(Config.from_dict(settings))
