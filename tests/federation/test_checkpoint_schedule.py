# SPDX-License-Identifier: Apache-2.0
"""Checkpoints during a run, what is kept of them, and reports that are the same in every run."""

import dataclasses
import shutil

import pytest
from faulty_task import CONFIG, RaisingTask
from nano_task import NanoTask, json_lines, nano, settings
from torch.distributed import HashStore

from fomoe.errors import SiteFailed, UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint, remove_older
from fomoe.federation.config import Config
from fomoe.federation.launch import train
from fomoe.federation.launch.opening import go_on, opened_in_an_attempt
from fomoe.federation.run_folder import RunFolder

FIVE = dataclasses.replace(CONFIG, rounds=5)


def config_of(folder, **run):
    values = settings(FIVE, folder).to_dict()
    values["run"] |= run
    return Config.from_dict(values)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Five rounds of three steps, a checkpoint after two, four and five, two of them kept."""
    run = tmp_path_factory.mktemp("schedule") / "run"
    train(config_of(run, checkpoint_every=2, keep_checkpoints=2), task=NanoTask(FIVE))
    return run


def test_the_latest_checkpoints_are_kept(finished):
    assert names(finished) == ["round-000004", "round-000005"]
    manifest = Checkpoint(finished / "checkpoints" / "round-000004").manifest
    assert (manifest["completed_rounds"], manifest["step"]) == (4, 12)
    assert manifest["summary"]["loss"] is None  # there was no evaluation after that round
    evaluations = [x for x in json_lines(finished / "metrics.jsonl") if x["kind"] == "evaluation"]
    assert [line["round"] for line in evaluations] == [4]


def test_an_older_checkpoint_goes_when_the_newer_is_there(tmp_path):
    for rounds in (2, 10, 999999, 1000000):
        folder = tmp_path / "checkpoints" / f"round-{rounds:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "round-000001").mkdir()  # no manifest: none of ours
    (tmp_path / "checkpoints" / ".removed-round-000000").mkdir()  # a kill has left it behind
    remove_older(tmp_path, keep=2)
    assert names(tmp_path) == ["round-000001", "round-1000000", "round-999999"]
    assert find_checkpoint(tmp_path).name == "round-1000000"


def test_a_run_that_fails_goes_on_from_its_last_checkpoint_to_the_same_end(finished, tmp_path):
    run = tmp_path / "run"
    config = config_of(run, checkpoint_every=2)
    with pytest.raises(SiteFailed, match=r"planted; the last complete .*round-000004: continue"):
        train(config, task=RaisingTask(FIVE, step=13))
    train(config, task=NanoTask(FIVE), resume=run)
    ends = [Checkpoint(find_checkpoint(folder)) for folder in (finished, run)]
    assert ends[0].files == ends[1].files
    ledgers = [(folder / "ledger.jsonl").read_bytes() for folder in (finished, run)]
    assert ledgers[0] == ledgers[1]


def test_a_launcher_that_starts_a_finished_run_again_finds_it_finished(finished):
    with RunFolder(finished) as folder:
        opening = go_on(config_of(finished), NanoTask(FIVE), folder, threads=1, restarted=True)
    assert opening.summary == Checkpoint(find_checkpoint(finished)).manifest["summary"]


def open_once(run, store):
    with opened_in_an_attempt(config_of(run), NanoTask(FIVE), None, store) as opening:
        return opening.first_round


def test_an_attempt_goes_on_only_where_an_earlier_one_has_begun(finished, tmp_path):
    store = HashStore()
    assert open_once(tmp_path / "run", store) == 0
    assert open_once(tmp_path / "run", store) == 0  # killed before its first checkpoint
    shutil.copytree(finished / "checkpoints", tmp_path / "run" / "checkpoints")
    assert open_once(tmp_path / "run", store) == 5
    of_another_run = HashStore()
    for _ in range(2):
        with pytest.raises(UserError, match="already holds a checkpoint"):
            open_once(tmp_path / "run", of_another_run)


class PoisonedTask(NanoTask):
    """What site 1 reads makes its loss infinite in the second round."""

    def loss(self, model, tokens):
        loss = super().loss(model, tokens)
        return type(loss)(*(value * float("inf") for value in loss)) if self.poisoned else loss

    poisoned = False

    def batch(self, site, step):
        self.poisoned = site == 1 and step == 4
        return super().batch(site, step)


def test_a_site_that_is_left_out_is_in_the_metrics_and_on_standard_error(tmp_path, capsys):
    config = nano.Config(**{**CONFIG.__dict__, "overlap": 3})
    train(settings(config, tmp_path / "run"), task=PoisonedTask(config))
    rounds = [x for x in json_lines(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "round"]
    assert [line["rejected"] for line in rounds] == [[], [1]]
    errors = capsys.readouterr().err
    assert "round 1: site 1 was left out of the mean" in errors
    assert "nan" not in errors
