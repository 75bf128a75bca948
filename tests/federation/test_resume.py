# SPDX-License-Identifier: Apache-2.0
"""Going on from a checkpoint: same settings, same text, and a record without gaps or repeats."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from faulty_task import CONFIG, RaisingTask
from in_process import run_sites
from nano_task import NanoTask, joined_pieces, json_lines, momenta, settings
from test_failures import tiny

from fomoe.errors import SiteFailed, UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.launch import train
from fomoe.federation.placement import everywhere
from fomoe.federation.resume import check_corpus, notes
from fomoe.federation.run_folder import run_folder_of
from fomoe.federation.site import Site
from fomoe.federation.site_state import saved_state
from fomoe.nn import ModelTensor

LONGER = dataclasses.replace(CONFIG, rounds=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds of three steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(settings(CONFIG, folder), task=NanoTask(CONFIG))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(run, config=LONGER, task=None, **options):
    return train(settings(config, run), task=task or NanoTask(config), resume=run, **options)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_an_interrupted_resume_wrote_is_replaced_by_the_next(run):
    with pytest.raises(SiteFailed, match="planted"):
        resume(run, task=RaisingTask(LONGER, step=10))
    assert max(line.get("step", 0) for line in json_lines(run / "metrics.jsonl")) >= 8
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step", "st')  # as a kill leaves it
    resume(run)
    metrics = json_lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics if line["kind"] == "step"] == list(range(12))
    assert [line["round"] for line in metrics if line["kind"] == "round"] == [0, 1, 2, 3]
    assert [line["round"] for line in metrics if line["kind"] == "evaluation"] == [1, 3]
    places = [(x["round"], x["site"], x["class"]) for x in json_lines(run / "ledger.jsonl")]
    assert len(places) == len(set(places))
    assert {place[0] for place in places} == {0, 1, 2, 3}


def test_a_damaged_line_before_the_checkpoint_is_named(run):
    lines = (run / "ledger.jsonl").read_text().splitlines()
    lines[2] = "{"
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"ledger.jsonl line 3 is damaged"):
        resume(run)


def test_another_text_is_refused_before_anything_is_written(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a small text, " * 10000)
    train(tiny(tmp_path, f"data.paths=['{text}']"))
    text.write_text("another text, " * 10000)
    before = contents(tmp_path / "run")
    longer = tiny(tmp_path, f"data.paths=['{text}']", "federation.rounds=2")
    with pytest.raises(UserError, match=r"the data has SHA-256 \w{64}, but .*\w{64}"):
        train(longer, resume=tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_task_without_text_has_no_hash_to_compare(tmp_path):
    check_corpus({"corpus_sha256": None}, None, tmp_path)
    with pytest.raises(UserError, match="SHA-256 None, but the run in"):
        check_corpus({"corpus_sha256": "12ab"}, None, tmp_path)


def test_a_checkpoint_folder_stands_for_its_run(run):
    checkpoint = find_checkpoint(run)
    before = contents(checkpoint)
    train(settings(LONGER, run / "unused"), task=NanoTask(LONGER), resume=checkpoint)
    assert contents(checkpoint) == before
    assert run_folder_of(checkpoint) == run_folder_of(run) == run
    assert find_checkpoint(run).name == "round-000004"
    assert not (run / "unused").exists()
    manifest = Checkpoint(find_checkpoint(run)).manifest
    assert manifest["config"]["run"]["folder"] == str(run)


def test_only_the_latest_checkpoint_of_a_run_can_be_continued(run):
    shutil.copytree(find_checkpoint(run), run / "checkpoints" / "round-000007")
    earlier = run / "checkpoints" / "round-000002"
    with pytest.raises(UserError, match=r"is not the latest checkpoint of .* round-000007"):
        train(settings(LONGER, run), task=NanoTask(LONGER), resume=earlier)


def test_a_checkpoint_outside_of_a_run_is_refused(run, tmp_path):
    alone = shutil.copytree(find_checkpoint(run), tmp_path / "alone")
    before = contents(alone)
    with pytest.raises(UserError, match=r"alone is a checkpoint outside of a run folder"):
        train(settings(LONGER, run), task=NanoTask(LONGER), resume=alone)
    assert contents(alone) == before


def test_a_finished_run_is_refused_but_gets_the_summary_it_could_not_write(run):
    with pytest.raises(UserError, match=r"has completed 2 rounds already"):
        resume(run, CONFIG)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    assert resume(run, CONFIG) == summary
    assert json.loads((run / "summary.json").read_text()) == summary
    with pytest.raises(UserError, match=r"has completed 2 rounds already: .* \(now 1\) higher"):
        resume(run, dataclasses.replace(CONFIG, rounds=1))


def test_a_resume_says_what_makes_it_differ_from_an_uninterrupted_run(run, capsys):
    manifest = Checkpoint(find_checkpoint(run)).manifest
    assert manifest["threads_per_site"] == [1, 1, 1]
    assert notes(manifest, settings(CONFIG, run), threads=1) == []
    manifest |= {"versions": {"torch": "1.0"}, "threads_per_site": [2, 4, 2]}
    assert notes(manifest, settings(CONFIG, run), threads=1) == [
        f"the result will not be bit-exact: torch was 1.0, is now {torch.__version__}",
        "the result will not be bit-exact: threads per site were 2, 4, are now 1",
    ]
    resume(run)
    errors = capsys.readouterr().err
    assert "note: federation.rounds was 2, is now 4: the learning rate goes on as if 4" in errors
    flat = dataclasses.replace(LONGER, min_ratio=1.0)
    assert len(notes(manifest, settings(flat, run), threads=1)) == 2


# ---- with other settings than before ---------------------------------------------------------

FLAT = dataclasses.replace(CONFIG, min_ratio=1.0, overlap=2, warmup=0, num_experts=12)


def all_state(run):
    """Parameters, momenta by tensor, and every site's AdamW state, of the latest checkpoint."""
    checkpoint = Checkpoint(find_checkpoint(run))
    inner = [
        {
            name: value
            for name, value in checkpoint.state(site).items()
            if name.split("/")[0] != "outer_momentum"
        }
        for site in range(checkpoint.sites)
    ]
    return checkpoint.model(), momenta(checkpoint, FLAT), inner


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sites": 2, "overlap": 1}, "federation.sites was 3, is now 2: tensors and momenta"),
        ({"sites": 4}, "federation.sites was 3, is now 4"),
        ({"sites": 1, "overlap": 1}, "federation.sites was 3, is now 1"),
        ({"placement": "random"}, "federation.placement was 'fixed', is now 'random'"),
        ({"overlap": 1}, "federation.overlap was 2, is now 1: a site begins with the weights"),
        ({"strategy": "diloco"}, "federation.strategy was 'fomoe', is now 'diloco'"),
    ],
    ids=["2-sites", "4-sites", "1-site", "random", "one-holder", "diloco"],
)
def test_a_run_goes_on_with_other_sites_or_places_and_loses_nothing(
    changes, sentence, tmp_path, capsys
):
    before = dataclasses.replace(FLAT, rounds=1)
    train(settings(before, tmp_path), task=NanoTask(before))
    parameters, outer, inner = all_state(tmp_path)
    held = {name: value for state in inner for name, value in state.items()}

    after = dataclasses.replace(FLAT, rounds=2, **changes)
    sites = run_sites(
        after.sites,
        lambda transport: Site(
            settings(after, tmp_path), NanoTask(after), transport,
            Checkpoint(find_checkpoint(tmp_path)),
        ),
    )  # fmt: skip
    pieces: dict[str, torch.Tensor] = {}
    for site in sites:
        for tensor in site.tensors:
            assert torch.equal(tensor.value, parameters[tensor.name])
        for name, value in site.optimizer.state().items():
            own = inner[site.site % 3].get(name)
            assert name in held
            assert own is None or torch.equal(value, own), (site.site, name, value, own)
        pieces |= site.meetings.outer.momentum
    for name, value in joined_pieces(pieces, after).items():
        assert torch.equal(value, outer[name]), name

    resume(tmp_path, after)
    assert sentence in capsys.readouterr().err
    assert Checkpoint(find_checkpoint(tmp_path)).manifest["completed_rounds"] == 2


class CheckpointOfTwoSites:
    """The second site still warms up an expert that came to it; the first has had it for long."""

    sites, placement = 2, None
    files = (
        {"step/a": torch.tensor(9.0), "exp_avg/a": torch.ones(1)},
        {"step/a": torch.tensor(1.0), "exp_avg/a": torch.zeros(1), "age/a": torch.tensor(1)},
    )

    def state_names(self, site):
        return set(self.files[site])

    def state(self, site, names):
        return {name: self.files[site][name] for name in names}


@pytest.mark.parametrize("site", [0, 1])
def test_all_of_a_tensors_state_comes_from_one_site(site):
    checkpoint = CheckpointOfTwoSites()
    parameter = torch.nn.Parameter(torch.ones(1))
    meetings = SimpleNamespace(exchange=SimpleNamespace(owned=[]))
    tensors = [ModelTensor("a", parameter)]
    placement = everywhere(0, 0, 3)
    assert saved_state(checkpoint, site, placement, tensors, meetings) == checkpoint.files[site]
