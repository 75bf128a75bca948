# SPDX-License-Identifier: Apache-2.0
"""A whole small run of the language model through the command line: what it leaves behind."""

import json

import pytest
import torch
from nano_task import json_lines
from tiny_run import SETTINGS

from fomoe.cli import main
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.ledger import EXCHANGE_CLASSES


def train(folder, *overrides):
    config = folder / "config.toml"
    config.write_text(SETTINGS)
    assert main(["train", "--config", str(config), f"run.folder={folder}/run", *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(folder, "federation.rounds=4", "federation.local_steps=8", "evaluation.every=2")


def metrics(run, kind):
    return [line for line in json_lines(run / "metrics.jsonl") if line["kind"] == kind]


def test_every_step_and_round_of_every_site_is_in_the_metrics(run):
    assert [line["step"] for line in metrics(run, "step")] == list(range(32))
    assert {len(line["losses"]) for line in metrics(run, "step")} == {2}
    assert [line["round"] for line in metrics(run, "round")] == [0, 1, 2, 3]
    assert [line["round"] for line in metrics(run, "evaluation")] == [1, 3]


def test_the_loss_falls(run):
    losses = [sum(line["losses"]) / 2 for line in metrics(run, "step")]
    assert losses[-1] < losses[0] - 0.5


def test_half_of_the_experts_are_ghosts_and_about_half_of_the_paths(run):
    summary = json.loads((run / "summary.json").read_text())
    assert 0.3 < summary["ghost_share"] < 0.7
    shared_and_all = summary["parameters"]
    held = summary["parameters_per_site"]
    assert held[0] == held[1] < shared_and_all


def test_the_summary_adds_up_to_the_ledger(run):
    summary = json.loads((run / "summary.json").read_text())
    by_site = [0, 0]
    for line in json_lines(run / "ledger.jsonl"):
        if line["class"] in EXCHANGE_CLASSES:
            by_site[line["site"]] += line["bytes"]
    assert by_site == summary["bytes_per_site"]
    classes = {line["class"] for line in json_lines(run / "ledger.jsonl")}
    assert classes == {"shared", "router", "expert", "tokens", "metrics", "evaluation"}


def test_memory_is_reported_by_class_and_counts_only_what_a_site_holds(run):
    summary = json.loads((run / "summary.json").read_text())
    for held, memory in zip(
        summary["parameters_per_site"], summary["memory_per_site"], strict=True
    ):
        assert memory["parameters"] == memory["gradients"] == memory["round_start"] == 4 * held
        assert 8 * held <= memory["optimizer"] < 8.1 * held
        assert memory["peak_rss"] > 10**8


def test_a_resumed_run_adds_to_what_came_before(tmp_path):
    run = train(tmp_path)
    first = json.loads((run / "summary.json").read_text())
    train(tmp_path, "federation.rounds=2", "--resume", str(run))
    second = json.loads((run / "summary.json").read_text())
    assert second["tokens"] == 2 * first["tokens"]
    assert second["bytes_per_site"] == [2 * sent for sent in first["bytes_per_site"]]
    assert [line["step"] for line in metrics(run, "step")] == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["ddp", "diloco"])
def test_the_seconds_of_the_exchange_are_counted_in_every_strategy(strategy, tmp_path):
    run = train(tmp_path, f"federation.strategy={strategy}", "federation.overlap=2")
    (line,) = metrics(run, "round")
    assert 1e-4 < line["exchange_seconds"] < line["seconds"]  # a meeting skipped takes 1e-6


def test_bf16_computes_in_bfloat16_and_keeps_fp32_weights(tmp_path):
    run = train(tmp_path, "training.precision=bf16", "optimizer.lr=1e-6")
    tensors = Checkpoint(find_checkpoint(run)).model()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    full = train(tmp_path, f"run.folder={tmp_path}/fp32", "optimizer.lr=1e-6").with_name("fp32")
    half, whole = (metrics(folder, "step")[0]["losses"][0] for folder in (run, full))
    assert half != whole
    assert half == pytest.approx(whole, rel=0.02)
