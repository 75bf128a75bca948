# SPDX-License-Identifier: Apache-2.0
"""The run folder belongs to one run at a time, and what cannot be written there is named."""

import json

import pytest
from faulty_task import CONFIG, RaisingTask
from nano_task import NanoTask, settings
from recorded_disk import Disk, Recorder

from fomoe.cli import main
from fomoe.errors import SiteFailed, UserError
from fomoe.federation.launch import train
from fomoe.federation.run_folder import RunFolder
from fomoe.files import JsonLines, make_folder, write_text


def start(folder, task=None, resume=None, save=True):
    config = settings(CONFIG, folder)
    run = config.run.model_copy(update={"save": save})
    config = config.model_copy(update={"run": run})
    return train(config, task=task or NanoTask(CONFIG), resume=resume)


def test_a_folder_in_use_is_refused_to_a_new_and_to_a_resumed_run(tmp_path):
    start(tmp_path / "saved")
    for folder, resume in ((tmp_path / "new", None), (tmp_path / "saved", tmp_path / "saved")):
        with RunFolder(folder), pytest.raises(UserError, match=f"{folder} is in use by another"):
            start(folder, resume=resume)


def test_the_folder_is_free_again_after_a_run_that_failed(tmp_path):
    with pytest.raises(SiteFailed, match="planted"):
        start(tmp_path, RaisingTask(CONFIG))
    start(tmp_path)


def test_the_summary_of_an_earlier_run_does_not_survive_a_new_one(tmp_path):
    start(tmp_path, save=False)
    assert (tmp_path / "summary.json").exists()
    with pytest.raises(SiteFailed, match="planted"):
        start(tmp_path, RaisingTask(CONFIG))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_a_full_disk_while_training_is_one_sentence(name, tmp_path):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/{name}: No space left"):
        start(tmp_path)


def test_a_run_that_could_not_write_its_summary_gets_it_by_a_resume(tmp_path):
    (tmp_path / ".summary.json.incomplete").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/summary.json: No space left"):
        start(tmp_path)
    summary = start(tmp_path, resume=tmp_path)
    assert summary["rounds"] == CONFIG.rounds
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*metrics.jsonl: Is a directory"):
        start(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_sentence():
    with pytest.raises(UserError, match=r"^cannot write run.folder /proc/run: "):
        start("/proc/run")


@pytest.mark.parametrize("path", [".", "..", "folder"])
def test_a_folder_cannot_be_written_as_a_file_and_nothing_is_left_beside_it(
    path, tmp_path, monkeypatch
):
    (tmp_path / "inside" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(IsADirectoryError):
        write_text(type(tmp_path)(path), "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "folder"]


def test_a_file_has_its_name_before_the_folder_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "fomoe.files.sync_folder", lambda folder: synced.extend(p.name for p in folder.iterdir())
    )
    write_text(tmp_path / "file.txt", "text")
    assert synced == ["file.txt"]


def test_a_report_to_a_folder_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fomoe.federation.report.render", lambda runs: "<html>")
    monkeypatch.setattr("fomoe.federation.report.read_runs", lambda folders: [])
    assert main(["report", str(tmp_path), "--output", "."]) == 2
    assert capsys.readouterr().err == "error: cannot write report .: Is a directory\n"


def after_a_power_failure(root, work):
    """The names below ``root`` that are left when the power fails after ``work``."""
    recorder, disk = Recorder(root), Disk({})
    with recorder.recording():
        work()
    for change in recorder.changes:
        disk.apply(change)
    return set(disk.left("nothing unsynced"))


def test_the_names_of_new_folders_outlast_a_power_failure(tmp_path):
    left = after_a_power_failure(tmp_path, lambda: make_folder(tmp_path / "runs" / "first"))
    assert left == {"runs", "runs/first"}


def test_the_name_of_a_run_folder_outlasts_a_power_failure(tmp_path):
    def work():
        with RunFolder(tmp_path / "run"):
            pass

    assert "run" in after_a_power_failure(tmp_path, work)


@pytest.mark.parametrize("anew", [True, False])
def test_the_name_of_a_file_of_lines_outlasts_a_power_failure(anew, tmp_path):
    def work():
        with JsonLines(tmp_path / "lines.jsonl", anew=anew):
            pass

    assert after_a_power_failure(tmp_path, work) == {"lines.jsonl"}


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "lines.jsonl"
    with JsonLines(path, anew=True) as lines:
        lines.write({"a": 1})
        assert path.read_text() == '{"a": 1}\n'
    with JsonLines(path, anew=False) as lines:
        lines.write({"b": 2})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'
    with JsonLines(path, anew=True):
        assert path.read_text() == ""
