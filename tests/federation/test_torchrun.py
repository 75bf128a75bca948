# SPDX-License-Identifier: Apache-2.0
"""Under a real torchrun: the same results, to the byte, whatever happens to the ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from nano_task import NanoTask, json_lines
from rank_program import configuration

from fomoe.cli import main
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.launch import train

PROGRAM = Path(__file__).with_name("rank_program.py")
PLAN = {
    "sites": 2,
    "rounds": 4,
    "accidents": [],
    "settings": {"federation.timeout": 2.0, "run.checkpoint_every": 2},
}
"""Four rounds of three steps; checkpoints after two and four."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run folder of the same run on one machine, without torchrun."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    nano_config, config = configuration(PLAN, run)
    train(config, task=NanoTask(nano_config))
    return run


def torchrun(*arguments, folder, environment=None):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stderr=subprocess.PIPE,
        text=True,
    )


def write_plan(folder, **changes):
    path = folder / "plan.json"
    path.write_text(json.dumps(PLAN | changes))
    return path


def errors_in(output) -> list[str]:
    """What fomoe says, among all that torchrun does."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


def digests(run):
    checkpoint = Checkpoint(find_checkpoint(run))
    checkpoint.verify()
    assert checkpoint.manifest["completed_rounds"] == 4
    return {record.name: record.sha256 for record in checkpoint.files}


def test_a_killed_and_a_stopped_rank_are_named_and_the_run_goes_on_by_itself(undisturbed, tmp_path):
    accidents = [(1, 4, signal.SIGKILL), (1, 8, signal.SIGSTOP)]  # in the rounds 1 and 2
    plan = write_plan(tmp_path, accidents=accidents)
    with torchrun(
        "--nproc-per-node=2", "--max-restarts=2", PROGRAM, plan, "run", folder=tmp_path
    ) as run:
        output = run.communicate()[1]
    assert run.returncode == 0, output
    killed, stopped = errors_in(output)
    assert killed == "error: the process of site 1 died; there is no checkpoint yet"
    assert stopped.startswith("error: site 1 has given no sign of life for 2 s (the last one: ")
    assert stopped.endswith(
        "; the last complete checkpoint is run/checkpoints/round-000002: "
        "continue with fomoe train --config ... --resume run"
    )
    assert digests(tmp_path / "run") == digests(undisturbed)
    ledger = "ledger.jsonl"
    assert (tmp_path / "run" / ledger).read_bytes() == (undisturbed / ledger).read_bytes()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_machines_without_a_common_folder_send_their_files(undisturbed, tmp_path):
    """Machine 0 is told to be site 1, so the coordinator is on machine 1; site 1 is killed."""
    plan = write_plan(tmp_path, accidents=[(1, 7, signal.SIGKILL)])
    port, machines = free_port(), []
    for machine in (0, 1):
        folder = tmp_path / f"machine-{machine}"
        folder.mkdir()
        machines.append(
            torchrun(
                "--nnodes=2", f"--node-rank={machine}", "--nproc-per-node=1", "--max-restarts=1",
                "--master-addr=127.0.0.1", f"--master-port={port}", PROGRAM, plan, "run",
                1 - machine, folder=folder,
            )
        )  # fmt: skip
    outputs = [machine.communicate()[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    (sentence,) = errors_in(outputs[1])
    assert sentence.startswith("error: site 1 has given no sign of life")
    assert "the last complete checkpoint is run/checkpoints/round-000002:" in sentence
    run = tmp_path / "machine-1" / "run"
    assert digests(run) == digests(undisturbed)
    assert list((tmp_path / "machine-0").iterdir()) == []
    assert list(run.glob(".attempt-*")) == list(run.glob("checkpoints/.*")) == []
    check_ledger(run, undisturbed)


def check_ledger(run, undisturbed):
    """What crossed the network for the checkpoints is there, and nothing else is different."""
    traveled, rest = {}, []
    for line in json_lines(run / "ledger.jsonl"):
        if line["class"] == "checkpoint":
            traveled[line["round"], line["site"]] = line["bytes"]
        else:
            rest.append(line)
    assert rest == json_lines(undisturbed / "ledger.jsonl")
    of_site_1 = {
        record.kind: record.bytes
        for record in Checkpoint(run / "checkpoints" / "round-000004").files
        if record.site == 1
    }
    # At the end the model's file is the evaluation's already.
    assert traveled == {(1, 1): sum(of_site_1.values()), (3, 1): of_site_1["state"]}


def test_ranks_with_different_settings_are_refused(tmp_path):
    """As torchrun starts them, but that rank 0 has to host the store."""
    ranks = []
    environment = {
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "False",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
    }  # fmt: skip
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        settings = PLAN["settings"] | {"optimizer.lr": 0.25 * (rank + 1)}
        plan = write_plan(folder, settings=settings)
        ranks.append(
            subprocess.Popen(
                [sys.executable, PROGRAM, plan, folder / "run"],
                env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [rank.communicate()[1] for rank in ranks]
    assert 2 in [rank.returncode for rank in ranks]
    sentence = (
        "error: optimizer.lr is 0.5 for site 1, but 0.25 for site 0: "
        "give all ranks the same settings"
    )
    assert errors_in("".join(outputs)) == [sentence]
    assert not (tmp_path / "0" / "run").exists()


def test_a_site_without_torchrun_is_refused(tmp_path, capsys):
    (tmp_path / "config.toml").write_text('[federation]\nstrategy = "diloco"\n')
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--site", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: --site 1 is for a rank started by torchrun")


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_mistake_in_the_file_is_said_once_on_every_machine(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert main(["train", "--config", "missing.toml"]) == 2
    assert capsys.readouterr().err.count("\n") == lines
