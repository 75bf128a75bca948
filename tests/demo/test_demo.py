# SPDX-License-Identifier: Apache-2.0
"""The whole demo, at a size that takes seconds."""

import json

import pytest

from fomoe.cli import main
from fomoe.demo import run
from fomoe.errors import UserError

SMALL = [
    "model.dim=32",
    "model.num_layers=1",
    "model.expert_dim=32",
    "federation.local_steps=2",
    "federation.rounds=2",
    "optimizer.warmup_steps=2",
    "training.batch_size=2",
    "training.sequence_length=32",
    "data.max_bytes=100000",
    "data.validation_sequences=8",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return folder, run(folder=folder, seed=3, overrides=SMALL)


def test_the_summary_holds_all_strategies_and_where_they_come_from(demo):
    folder, result = demo
    assert json.loads((folder / "summary.json").read_text()) == result
    assert list(result["strategies"]) == ["ddp", "ep", "diloco", "fomoe"]
    assert result["seed"] == 3
    for summary in result["strategies"].values():
        assert summary["corpus_sha256"] == result["corpus_sha256"]
        assert summary["tokens"] == result["strategies"]["ddp"]["tokens"]
    assert (folder / "report.html").stat().st_size > 10_000


def test_bytes_and_memory_hold_at_any_size(demo):
    _, result = demo
    holds = [verdict["holds"] for verdict in result["verdicts"]]
    assert holds[1:5] == [True] * 4


def test_the_strategies_start_from_the_same_weights_and_data(demo):
    folder, _ = demo
    first = {}
    for strategy in ("ddp", "diloco"):
        line = (folder / strategy / "metrics.jsonl").read_text().splitlines()[0]
        first[strategy] = json.loads(line)["losses"]
    assert first["ddp"] == first["diloco"]


def test_a_demo_that_misses_a_required_claim_exits_with_code_1(demo, capsys):
    folder, _ = demo  # so short a training stays above the bigram entropy
    assert main(["demo", "--folder", str(folder), *SMALL]) == 1
    assert "NO   every loss is below the bigram entropy" in capsys.readouterr().out


def test_a_folder_that_is_no_demo_is_not_touched(tmp_path):
    mine = tmp_path / "fomoe" / "weights"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no earlier demo"):
        run(folder=tmp_path)
    assert mine.read_text() == "mine"
    with pytest.raises(UserError, match="cannot use"):
        run(folder=mine)
