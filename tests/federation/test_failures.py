# SPDX-License-Identifier: Apache-2.0
"""A user's mistake or a lost process ends in one sentence, no orphans and nothing half written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_task import CONFIG, KilledTask, RaisingTask
from nano_task import settings

from fomoe.cli import main
from fomoe.errors import SiteFailed
from fomoe.federation.launch import train

HERE = Path(__file__).parent
TINY = """
[model]
name = "tiny"
[federation]
strategy = "fomoe"
sites = 2
overlap = 1
local_steps = 2
rounds = 1
[training]
batch_size = 2
sequence_length = 32
[data]
max_bytes = 100000
validation_sequences = 4
"""


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


def test_the_site_that_failed_is_named_not_those_it_took_down(tmp_path):
    with pytest.raises(SiteFailed, match="site 1 failed: RuntimeError: planted"):
        train(settings(CONFIG, tmp_path / "run"), task=RaisingTask(CONFIG, tmp_path))


def test_sites_end_when_the_coordinator_is_killed(tmp_path):
    command = [sys.executable, str(HERE / "faulty_task.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as coordinator:
        assert coordinator.stdout.readline() == "training\n"
        coordinator.send_signal(signal.SIGKILL)
    process_ids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(process_ids) == 3
    assert not wait_until_gone(process_ids)


def test_control_c_ends_everything_with_code_130(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(TINY)
    command = [
        sys.executable, "-m", "fomoe", "train", "--config", str(config),
        "federation.rounds=100000", f"run.folder={tmp_path}/run",
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job of a script starts with SIGINT ignored; a terminal's job does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the whole group
        _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "Traceback" not in errors


def test_a_full_disk_at_checkpoint_time_is_one_sentence(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(TINY)
    arguments = f"-m fomoe train --config {config} run.folder={tmp_path}/run"
    # A file size limit of 100 kB stands for the full disk: the same write fails.
    run = subprocess.run(
        ["bash", "-c", f"ulimit -f 100; {sys.executable} {arguments}"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "error: cannot write checkpoint file" in run.stderr
    assert ".safetensors: " in run.stderr
    assert "Traceback" not in run.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


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
    config = tmp_path / "config.toml"
    config.write_text(TINY)
    code = main(["train", "--config", str(config), f"run.folder={tmp_path}/run", setting])
    errors = capsys.readouterr().err
    assert code == 2
    assert sentence in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_with_a_checkpoint_is_not_overwritten(tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(TINY)
    arguments = ["train", "--config", str(config), f"run.folder={tmp_path}/run"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", str(tmp_path / "run"), "optimizer.lr=0.5"]) == 2
    assert "optimizer.lr is 0.5, but the run" in capsys.readouterr().err
