# SPDX-License-Identifier: Apache-2.0
"""The folder format: whole or absent, checked when read, and enough to rebuild the model."""

import json

import pytest
import torch
from nano_task import json_lines
from tiny_run import SETTINGS

from fomoe.cli import main
from fomoe.errors import UserError
from fomoe.federation import checkpoint
from fomoe.federation.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    Manifest,
    Totals,
    commit,
    find_checkpoint,
    round_folder,
    write_shard,
)
from fomoe.federation.config import load_config
from fomoe.federation.health import RoutingHealth
from fomoe.federation.task import LanguageModelTask
from fomoe.models import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two sites that hold half of the experts each."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(SETTINGS)
    config = str(folder / "config.toml")
    overrides = [f"run.folder={folder}/run", "training.threads=2"]
    assert main(["train", "--config", config, *overrides]) == 0
    return folder


def write_small(folder):
    incomplete = folder / "checkpoints" / ".incomplete"
    incomplete.mkdir(parents=True)
    record = write_shard(incomplete, "model", 0, {"a": torch.arange(3.0)})
    totals = Totals(
        tokens=0,
        seconds=0.0,
        ghost_shares=[],
        routing_health=RoutingHealth(),
        exchange_bytes=[],
        bytes_by_class={},
    )
    manifest = Manifest(
        config={}, model={}, completed_rounds=2, step=2, placement=[], rng={}, data_cursor=[],
        corpus_sha256=None, totals=totals, summary={"loss": float("nan")}, threads_per_site=[],
        versions={}, files=[record],
    )  # fmt: skip
    commit(incomplete, round_folder(folder, 2), manifest)
    return find_checkpoint(folder)


def change_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_written_checkpoint_reads_back(tmp_path):
    checkpoint = Checkpoint(write_small(tmp_path))
    checkpoint.verify()
    assert checkpoint.folder.name == "round-000002"
    assert torch.equal(checkpoint.model()["a"], torch.arange(3.0))


def test_only_rows_of_stacked_tensors_are_copied_to_be_written(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path: written.update(tensors))
    whole, stacked = torch.arange(3.0), torch.arange(6.0).view(2, 3)
    monkeypatch.setattr(checkpoint, "sync_file", lambda path: path.touch())
    write_shard(tmp_path, "model", 0, {"whole": whole, "row": stacked[1]})
    assert written["whole"].data_ptr() == whole.data_ptr()
    assert written["row"].untyped_storage().nbytes() == 12
    assert torch.equal(written["row"], stacked[1])


def test_a_flipped_byte_is_noticed(tmp_path):
    folder = write_small(tmp_path)
    path = folder / "model-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model-0.safetensors is damaged: SHA-256"):
        Checkpoint(folder).verify()


def test_a_newer_format_is_refused_with_both_versions(tmp_path):
    folder = write_small(tmp_path)
    change_manifest(folder, lambda manifest: manifest.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(UserError, match=f"{FORMAT_VERSION + 1}; this fomoe reads up to"):
        Checkpoint(folder)


@pytest.mark.parametrize("key", [*Manifest.model_fields, "format_version"])
def test_a_manifest_that_lacks_a_key_is_refused_and_the_key_named(key, tmp_path):
    folder = write_small(tmp_path)
    change_manifest(folder, lambda manifest: manifest.pop(key))
    with pytest.raises(UserError, match=rf"manifest.json is damaged: .*{key}"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda manifest: manifest.update(completed_rounds="2"), "completed_rounds"),
        (lambda manifest: manifest["totals"].pop("tokens"), "totals.tokens"),
        (lambda manifest: manifest["files"][0].pop("sha256"), "files.0.sha256"),
    ],
)
def test_a_wrong_value_inside_the_manifest_is_refused(change, key, tmp_path):
    folder = write_small(tmp_path)
    change_manifest(folder, change)
    with pytest.raises(UserError, match=f"manifest.json is damaged: {key}: "):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"text"'])
def test_a_manifest_that_is_no_json_object_is_refused(text, tmp_path):
    folder = write_small(tmp_path)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        Checkpoint(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    round_folder(tmp_path, 3).mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


def test_the_manifest_says_all_that_a_resume_needs(run):
    manifest = Checkpoint(find_checkpoint(run / "run")).manifest
    assert manifest["completed_rounds"] == 1
    assert manifest["step"] == 2
    seen = {"step": 2, "first_step": 0, "base": 0, "sequences": 8}
    assert manifest["data_cursor"] == [seen, seen]
    assert manifest["placement"][0][:3] == [[0], [1], [0]]
    assert manifest["config"]["federation"]["overlap"] == 1
    assert manifest["threads_per_site"] == [2, 2]
    assert manifest["summary"] == json.loads((run / "run" / "summary.json").read_text())
    assert len(manifest["corpus_sha256"]) == 64


def test_each_expert_is_written_once_by_a_site_that_holds_it(run):
    checkpoint = Checkpoint(find_checkpoint(run / "run"))
    names = []
    for record in checkpoint.files:
        if record.kind == "model":
            part = Checkpoint(checkpoint.folder)
            part.files = [record]
            for name in part.model():
                names.append(name)
                if ".experts." in name:
                    layer, expert = int(name.split(".")[1]), int(name.split(".")[4])
                    assert record.site in checkpoint.manifest["placement"][layer][expert]
    assert len(names) == len(set(names))


def test_an_exported_model_has_the_loss_the_run_reported(run):
    assert main(["export", str(run / "run"), str(run / "model.safetensors")]) == 0
    model = load_model(run / "model.safetensors")
    config = load_config(run / "config.toml")
    loss = LanguageModelTask(config).validation_loss(model)
    evaluation = [x for x in json_lines(run / "run" / "metrics.jsonl") if x["kind"] == "evaluation"]
    assert loss == pytest.approx(evaluation[-1]["loss"], rel=1e-6)
    summary = json.loads((run / "run" / "summary.json").read_text())
    assert summary["loss"] == evaluation[-1]["loss"]
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]


def test_an_export_that_cannot_be_written_leaves_nothing(run, capsys):
    assert main(["export", str(run / "run"), "/proc/model.safetensors"]) == 2
    assert "cannot write /proc/model.safetensors" in capsys.readouterr().err


def test_an_export_to_a_folder_is_the_same_model(run):
    assert main(["export", str(run / "run"), str(run / "exported")]) == 0
    assert main(["export", str(run / "exported"), str(run / "again.safetensors")]) == 0
    tokens = torch.arange(9).view(1, 9)
    logits = [load_model(run / name)(tokens) for name in ("exported", "again.safetensors")]
    assert torch.equal(*logits)


def test_an_export_of_a_run_is_of_its_checkpoint_whatever_lies_beside(run):
    (run / "run" / "model.safetensors").write_bytes(b"an older export")
    assert main(["export", str(run / "run"), str(run / "newest.safetensors")]) == 0
    assert load_model(run / "newest.safetensors")
    (run / "run" / "model.safetensors").unlink()


def test_an_export_of_nothing_ends_in_one_sentence(run, capsys):
    assert main(["export", str(run / "absent"), str(run / "out")]) == 2
    assert "absent does not exist: expected a run folder or a model" in capsys.readouterr().err
