# SPDX-License-Identifier: Apache-2.0
"""A site or coordinator that hangs ends the run within the timeout, and the sentence says where."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_task import CONFIG, AccidentTask, HangingTask
from nano_task import settings
from test_failures import HERE, wait_until_gone

from fomoe.errors import SiteFailed
from fomoe.federation.launch import train


def impatient(folder, config=CONFIG, **run):
    """nano's settings with a timeout of two seconds."""
    values = settings(config, folder, timeout=2.0).to_dict()
    values["run"] |= run
    return type(settings(CONFIG, folder)).from_dict(values)


def test_a_site_that_is_stopped_is_named_and_all_end(tmp_path):
    task = AccidentTask(CONFIG, tmp_path, [(2, 4, signal.SIGSTOP)])
    with pytest.raises(SiteFailed) as failure:
        train(impatient(tmp_path / "run", checkpoint_every=1), task=task)
    sentence = str(failure.value)
    assert sentence.startswith("site 2 has given no sign of life for 2 s (the last one: ")
    run = tmp_path / "run"
    assert sentence.endswith(
        f"the last complete checkpoint is {run}/checkpoints/round-000001: "
        f"continue with fomoe train --config ... --resume {run}"
    )
    assert not wait_until_gone(task.process_ids())


@pytest.mark.parametrize("strategy", ["fomoe", "ddp"])
def test_a_site_that_hangs_in_its_own_computation_is_told_from_those_that_wait(strategy, tmp_path):
    """With ddp the others wait in the middle of the same step, for its gradients."""
    config = dataclasses.replace(CONFIG, strategy=strategy)
    with pytest.raises(SiteFailed, match=r"^site 1 hangs: .* step 4 for 2 s; there is no checkp"):
        train(impatient(tmp_path / "run", config), task=HangingTask(config))


def test_sites_end_when_the_coordinator_is_stopped(tmp_path):
    command = [sys.executable, str(HERE / "faulty_task.py"), str(tmp_path), "2.0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as coordinator:
        try:
            assert coordinator.stdout.readline() == "training\n"
            coordinator.send_signal(signal.SIGSTOP)
            process_ids = [int(path.read_text()) for path in Path(tmp_path).glob("*.pid")]
            assert len(process_ids) == 3
            assert not wait_until_gone(process_ids)
        finally:
            coordinator.kill()
        assert (
            "ends: the coordinator has given no sign of life for 2 s" in coordinator.stderr.read()
        )
