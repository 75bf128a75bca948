# SPDX-License-Identifier: Apache-2.0
"""A user's mistake or a lost process ends in one sentence, no orphans and nothing half written."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from faulty_task import (
    CONFIG,
    BadEndTask,
    ChangedTextTask,
    DriftingTask,
    FullDiskTask,
    KilledExpertParallelTask,
    KilledTask,
    KilledWhileEvaluatingTask,
    LocalTask,
    RaisingTask,
)
from nano_task import NanoTask, settings
from tiny_run import arguments, write_settings

from fomoe.cli import main
from fomoe.errors import SiteFailed, UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.config import load_config
from fomoe.federation.launch import train
from fomoe.federation.launch.processes import SiteProcesses
from fomoe.federation.launch.site_process import SiteOrder

HERE = Path(__file__).parent


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(process_ids, seconds=20) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in process_ids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_a_killed_site_is_named_and_takes_the_others_with_it(tmp_path):
    task = KilledTask(CONFIG, tmp_path)
    with pytest.raises(SiteFailed, match=r"site 2 died \(signal SIGKILL\)"):
        train(settings(CONFIG, tmp_path / "run"), task=task)
    assert len(task.process_ids()) == 3
    assert not wait_until_gone(task.process_ids())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_site_that_dies_while_tokens_travel_is_named(tmp_path):
    path = write_settings(tmp_path)
    overrides = ["federation.strategy=ep", "federation.overlap=1", f"run.folder={tmp_path}/ep"]
    config = load_config(path, overrides)
    with pytest.raises(SiteFailed, match=r"site 1 died \(signal SIGKILL\)"):
        train(config, task=KilledExpertParallelTask(config))


def test_a_killed_run_that_exchanges_tokens_goes_on_to_the_same_bits(tmp_path):
    path = write_settings(tmp_path)

    def config(name):
        overrides = ["strategy=ep", "overlap=1", "rounds=2"]
        saving = [f"run.folder={tmp_path / name}", "run.checkpoint_every=1"]
        return load_config(path, [*(f"federation.{o}" for o in overrides), *saving])

    train(config("whole"))
    killed = config("killed")
    with pytest.raises(SiteFailed):
        train(killed, task=KilledExpertParallelTask(killed, step=3))
    train(killed, resume=tmp_path / "killed")
    whole, resumed = (Checkpoint(find_checkpoint(tmp_path / n)) for n in ("whole", "killed"))
    assert whole.position.step == 4
    expected, values = whole.model(), resumed.model()
    assert expected.keys() == values.keys()
    for name, value in expected.items():
        assert torch.equal(values[name], value), name


def test_the_site_that_failed_is_named_not_those_it_took_down(tmp_path):
    with pytest.raises(SiteFailed, match="site 1 failed: RuntimeError: planted"):
        train(settings(CONFIG, tmp_path / "run"), task=RaisingTask(CONFIG))


def test_a_site_that_dies_while_the_coordinator_evaluates_is_named(tmp_path):
    task = KilledWhileEvaluatingTask(CONFIG, tmp_path)
    with pytest.raises(SiteFailed, match=r"site 1 died \(signal SIGKILL\)"):
        train(settings(CONFIG, tmp_path / "run"), task=task)


def test_a_process_that_ends_badly_after_its_work_is_named(tmp_path):
    with pytest.raises(SiteFailed, match=r"site 1 finished its rounds, but .* \(exit code 3\)"):
        train(settings(CONFIG, tmp_path / "run"), task=BadEndTask(CONFIG))


@pytest.mark.parametrize(
    ("is_shared", "sentence"),
    [(True, "different shared tensors"), (False, r"different values of the experts of sites \d,1")],
    ids=["shared", "experts"],
)
def test_sites_that_come_to_hold_different_values_are_stopped(is_shared, sentence, tmp_path):
    config = dataclasses.replace(CONFIG, overlap=2)
    with pytest.raises(SiteFailed, match=sentence):
        train(settings(config, tmp_path / "run"), task=DriftingTask(config, is_shared))


def test_when_a_site_cannot_start_those_that_did_are_ended(tmp_path):
    def order(task, site):
        return SiteOrder(
            config=settings(CONFIG, tmp_path), task=task, site=site, run=tmp_path,
            port=0, resume=None, first_round=0, corpus_sha256=None,
        )  # fmt: skip

    processes = SiteProcesses([order(NanoTask(CONFIG), 0), order(LocalTask(CONFIG), 1)])
    with pytest.raises(AttributeError, match="lambda"), processes:
        pass
    assert [process.exitcode for process in processes.processes] == [-signal.SIGKILL]


def test_sites_end_when_the_coordinator_is_killed(tmp_path):
    command = [sys.executable, str(HERE / "faulty_task.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as coordinator:
        assert coordinator.stdout.readline() == "training\n"
        coordinator.send_signal(signal.SIGKILL)
    process_ids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(process_ids) == 3
    assert not wait_until_gone(process_ids)


def start_in_a_terminal(folder):
    """`fomoe train` as a process group of its own that Ctrl-C reaches."""
    command = [sys.executable, "-m", "fomoe", *arguments(folder, "federation.rounds=100000")]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job of a script starts with SIGINT ignored; a terminal's job does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def press_control_c_when(run, is_time) -> str:
    """Returns what the program wrote on standard error."""
    while not is_time():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the whole group
    return run.communicate(timeout=30)[1]


def test_control_c_ends_everything_with_code_130(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    with start_in_a_terminal(tmp_path) as run:
        errors = press_control_c_when(
            run, lambda: metrics.exists() and metrics.read_text().count("\n") > 3
        )
    assert run.returncode == 130
    assert "Traceback" not in errors


def test_control_c_while_the_sites_start_does_the_same(tmp_path):
    def the_fork_server_loads() -> bool:
        for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            with suppress(OSError):  # it may have ended by now
                if "libtorch" in Path(f"/proc/{child}/maps").read_text():
                    return True
        return False

    with start_in_a_terminal(tmp_path) as run:
        errors = press_control_c_when(run, the_fork_server_loads)
    assert run.returncode == 130
    assert errors == ""


def test_control_c_while_the_commands_load_is_code_130(monkeypatch):
    class Interrupted(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fomoe.cli.train", Interrupted("fomoe.cli.train"))
    assert main(["build-info"]) == 130


def tiny(folder, *overrides):
    return load_config(write_settings(folder), [f"run.folder={folder}/run", *overrides])


def test_a_full_disk_at_checkpoint_time_is_one_sentence(tmp_path):
    config = tiny(tmp_path)
    with pytest.raises(UserError, match=r"^cannot write checkpoint file .*\.safetensors: "):
        train(config, task=FullDiskTask(config))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_text_that_changes_before_the_sites_read_it_is_noticed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a small text, " * 10000)
    config = tiny(tmp_path, f"data.paths=['{text}']")
    with pytest.raises(UserError, match=r"site \d read data with SHA-256 \w{64}, .* \w{64}"):
        train(config, task=ChangedTextTask(config, text))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("data.paths=['missing.txt']", "missing.txt"),
        ("federation.overlap=3", "federation.overlap = 3"),
        ("federation.sites=3", "divisible"),
        ("training.sequence_length=20000", "training.sequence_length = 20000"),
    ],
)
def test_a_mistake_in_the_settings_is_found_before_any_site_starts(
    setting, sentence, tmp_path, capsys
):
    code = main(arguments(tmp_path, setting))
    errors = capsys.readouterr().err
    assert code == 2
    assert sentence in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_a_checkpoint_is_not_overwritten(tmp_path, capsys):
    command = arguments(tmp_path)
    assert main(command) == 0
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume", str(tmp_path / "run"), "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr is 0.5, but the run" in capsys.readouterr().err
