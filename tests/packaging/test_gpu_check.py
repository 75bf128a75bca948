# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check.py: its runner of steps, and what it says on a machine without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from steps import Runner, Step, table  # noqa: E402

FOREVER = "import time; print('begun', flush=True); time.sleep(600)"


def python(name, code, seconds=60.0, **options):
    return Step(name, [sys.executable, "-c", code], seconds, **options)


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "results", 60, {"about": "a test"})


def statuses(runner):
    return {result.step: result.status for result in runner.results}


def written(runner):
    return json.loads((runner.folder / "results.json").read_text())


def test_a_failure_is_kept_with_its_last_line_and_later_steps_go_on(runner):
    runner.run([[python("bad", "print('x = 3'); raise SystemExit(4)")], [python("good", "")]])
    bad, good = runner.results
    assert (bad.status, bad.exit_code, bad.note) == ("failed", 4, "x = 3")
    assert good.status == "passed"
    assert runner.failed()


def test_a_step_whose_need_did_not_pass_is_not_run(runner):
    steps = [python("build", "raise SystemExit(1)")], [python("test", "", needs=("build",))]
    runner.run(steps)
    assert statuses(runner) == {"build": "failed", "test": "not run"}
    assert runner.results[1].note == "build did not pass"


def test_a_step_is_ended_at_its_limit_with_all_that_it_started(runner):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FOREVER!r}])"
    begin = time.monotonic()
    runner.run([[python("endless", child, seconds=3.0)]])
    assert time.monotonic() - begin < 30
    assert statuses(runner) == {"endless": "timed out"}
    assert runner.results[0].note == "stopped after 3 s; begun"  # of the child
    assert runner.failed()


def test_results_before_the_limit_count_where_a_step_may_be_cut(runner):
    output = runner.folder / "numbers.jsonl"
    code = f"print(1, flush=True); {FOREVER}"
    runner.run([[python("bench", code, seconds=3.0, stdout=output, may_be_cut=True)]])
    assert statuses(runner) == {"bench": "cut"}
    assert output.read_text().split() == ["1", "begun"]
    assert not runner.failed()


def test_after_the_deadline_no_step_begins(tmp_path):
    runner = Runner(tmp_path, 0, {})
    runner.run([[python("late", "")]])
    assert statuses(runner) == {"late": "not run"}
    assert runner.results[0].note == "the time was up"
    assert not runner.failed()


def test_the_deadline_ends_a_step_that_is_running(tmp_path):
    runner = Runner(tmp_path, 3, {})
    runner.run([[python("endless", FOREVER, seconds=600)], [python("late", "")]])
    assert statuses(runner) == {"endless": "timed out", "late": "not run"}


def test_every_result_is_on_disk_before_the_next_step_begins(runner):
    path = str(runner.folder / "results.json")
    code = f"import json; print(json.load(open({path!r}))['steps'][0]['step'])"
    runner.run([[python("first", "")], [python("second", code)]])
    assert runner.results[1].note == "first"
    assert written(runner)["about"] == "a test"
    assert [step["status"] for step in written(runner)["steps"]] == ["passed", "passed"]


def test_steps_of_a_stage_run_side_by_side(runner):
    # Each waits for the file of the other.
    folder = runner.folder

    def step(own, other):
        code = (
            f"import pathlib, time\npathlib.Path({str(folder / own)!r}).touch()\n"
            f"while not pathlib.Path({str(folder / other)!r}).exists(): time.sleep(0.01)"
        )
        return python(own, code, seconds=30)

    runner.run([[step("a", "b"), step("b", "a")]])
    assert statuses(runner) == {"a": "passed", "b": "passed"}


def test_a_command_that_does_not_exist_is_a_failure(runner):
    runner.run([[Step("absent", ["/no/such/program"], 1)]])
    assert runner.results[0].note == "/no/such/program: No such file or directory"
    assert runner.failed()


def test_the_table_has_a_line_per_step(runner):
    runner.run([[python("one", "print('fine')")], [python("two", "raise SystemExit(1)")]])
    lines = table(runner.results).splitlines()
    assert [line.split()[:2] for line in lines] == [["one", "passed"], ["two", "failed"]]
    assert lines[0].endswith("fine")


def gpu_check(*arguments, **environment):
    command = [sys.executable, str(TOOLS / "gpu_check.py"), *arguments]
    environment = {name: v for name, v in os.environ.items() if name != "OUT"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def test_a_dry_run_lists_the_steps_in_order():
    run = gpu_check("--dry-run")
    assert run.returncode == 0
    names = [line.split("  ")[0] for line in run.stdout.splitlines()]
    order = [
        "machine",
        "build c++",
        "probes",
        "c++ tests",
        "pytest layer",
        "bench layer",
        "racecheck",
    ]
    assert [name for name in names if name in order] == order


def test_the_steps_that_a_chosen_one_needs_are_run_too():
    run = gpu_check("--dry-run", "--only", "probes")
    assert [line.split("  ")[0] for line in run.stdout.splitlines()] == [
        "machine", "build c++", "probes",
    ]  # fmt: skip
    assert "--only: expected one of machine, " in gpu_check("--only", "probe").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_stops_at_once_with_one_sentence(tmp_path):
    run = gpu_check(OUT=str(tmp_path))
    assert run.returncode == 1
    assert "finds no CUDA device on this machine" in run.stdout.splitlines()[-1]
    (step,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert step["status"] == "failed"
    assert step["note"].startswith("gpu-check: torch ")
