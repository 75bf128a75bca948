# SPDX-License-Identifier: Apache-2.0
"""The data of the language model's task: streams and texts, their cursor, and what is checked."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS
from tokenizers import Tokenizer, models, pre_tokenizers

from fomoe.cli import main
from fomoe.errors import UserError
from fomoe.federation.config import Config, load_config
from fomoe.federation.task import LanguageModelTask

WORDS = ["federation", "of", "experts", "across", "sites"]


def write(folder: Path) -> str:
    lines = [{"text": " ".join(WORDS[i % 5 :] * 3)} for i in range(200)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.txt").write_text("".join(f"{i} {WORDS[i % 5]}\n" for i in range(20_000)))
    return f"data.sources=[{{path='{folder}/a.jsonl', weight=2.0}}, {{path='{folder}/b.txt'}}]"


def write_tokenizer(folder: Path) -> str:
    vocabulary = {"?": 0, **{word: i + 300 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(f"{folder}/words.json")
    return f"data.tokenizer={folder}/words.json"


def settings(folder: Path, *overrides: str) -> Config:
    (folder / "config.toml").write_text(SETTINGS)
    return load_config(folder / "config.toml", ["data.max_bytes=0", *overrides])


@pytest.mark.parametrize("kind", ["text", "streams"])
def test_a_task_goes_on_from_the_states_of_all_sites(tmp_path: Path, kind: str):
    config = settings(tmp_path, *([write(tmp_path)] if kind == "streams" else []))
    task = LanguageModelTask(config)
    task.check()
    expected = [[task.batch(site, step) for site in range(2)] for step in range(4)]
    killed = pickle.loads(pickle.dumps(task))
    for step in range(2):
        for site in range(2):
            killed.batch(site, step)
    states = json.loads(json.dumps([killed.data_state(site) for site in range(2)]))
    resumed = LanguageModelTask(config)
    resumed.load_data_state(states)
    assert [resumed.data_state(site) for site in range(2)] == states
    for step in (2, 3):
        for site in range(2):
            assert torch.equal(resumed.batch(site, step), expected[step][site])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path):
    overrides = [write(tmp_path), write_tokenizer(tmp_path)]
    LanguageModelTask(settings(tmp_path, *overrides, "model.vocab_size=305")).check()
    with pytest.raises(UserError, match=r"model.vocab_size = 304 is smaller than the 305 tokens "):
        LanguageModelTask(settings(tmp_path, *overrides, "model.vocab_size=304")).check()


def test_a_shape_that_does_not_fit_names_its_setting():
    with pytest.raises(UserError, match=r"model.num_groups: expected a divisor of num_experts = "):
        LanguageModelTask(
            Config.from_dict({"federation": {"strategy": "ddp"}, "model": {"num_groups": 3}})
        )


def test_a_run_on_streams_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.toml").write_text(SETTINGS.replace("max_bytes = 100000\n", ""))
    overrides = [write(tmp_path), write_tokenizer(tmp_path), "model.vocab_size=305"]
    command = ["train", "--config", f"{tmp_path}/config.toml", f"run.folder={tmp_path}/run"]
    assert main([*command, *overrides]) == 0
    assert "nats per token. Results" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["token"] == "token"
    assert summary["bigram_entropy"] is None
    assert summary["corpus_bytes"] == sum(
        (tmp_path / n).stat().st_size for n in ("a.jsonl", "b.txt")
    )
    assert main(["report", f"{tmp_path}/run", "--output", f"{tmp_path}/report.html"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "nats per token" in page
    assert "bigram" not in page
