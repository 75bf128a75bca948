# SPDX-License-Identifier: Apache-2.0
"""Real kills: SIGKILL to `fomoe train` and all its processes at once, then `--resume`.

What must be equal is what test_crash_points.py compares after crashes at every instant.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from test_crash_points import assert_same, outcome
from tiny_run import arguments

from fomoe.cli import main

SETTINGS = (
    "federation.rounds=4", "federation.placement='random'", "federation.moved_warmup_steps=3",
    "federation.codec='int8'", "training.threads=1", "run.checkpoint_every=1",
    "run.keep_checkpoints=2",
)  # fmt: skip


def state_is_written(run):
    """A site is writing, or has written, its part of the next checkpoint."""
    return any(run.glob("checkpoints/.incomplete/state-*"))


def is_committed(run):
    return (run / "checkpoints" / "round-000002").exists()


def trains_after_experts_have_moved(run):
    """Round 2 began with a re-placement, and its first step is reported."""
    with suppress(FileNotFoundError):
        return '"step": 4' in (run / "metrics.jsonl").read_text()
    return False


def kill_when(is_time, folder):
    """Start a run, and kill it and all processes it has started."""
    with subprocess.Popen(
        [sys.executable, "-m", "fomoe", *arguments(folder, *SETTINGS)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        while not is_time(folder / "run"):
            assert run.poll() is None, "it has ended before"
            time.sleep(0.001)  # or looking would take a core from the run
        os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(folder, *SETTINGS)) == 0
    return outcome(folder)


@pytest.mark.parametrize(
    "is_time",
    [
        lambda run: is_committed(run) and state_is_written(run),
        is_committed,
        trains_after_experts_have_moved,
    ],
    ids=["in the midst of a checkpoint", "just after a rename", "after experts have moved"],
)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(is_time, expected, tmp_path):
    kill_when(is_time, tmp_path)
    assert main([*arguments(tmp_path, *SETTINGS), "--resume", str(tmp_path / "run")]) == 0
    assert_same(outcome(tmp_path), expected)
