# SPDX-License-Identifier: Apache-2.0
"""Two ranks of torchrun make the texts of one process."""

import io
import os
import subprocess
import sys

import pytest
import torch
from generation_models import tiny_model

from fomoe.errors import UserError
from fomoe.generate import Sampling
from fomoe.generate.command import Request, run
from fomoe.generate.ranks import ranks_of_this_run
from fomoe.models import save_model

PROMPTS = ["Once upon", "a", "In the"]


def torchrun(folder, *prompts):
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "fomoe", "generate", "--checkpoint", str(folder), "--max-new-tokens", "12",
            "--temperature", "0.8", "--seed", "4", *asked,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        timeout=100,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["moe", "foe"])
def test_experts_or_groups_on_two_ranks_make_the_same_texts(kind, tmp_path):
    save_model(tiny_model(kind, vocab_size=256), tmp_path)
    sampling = Sampling(temperature=0.8, seed=4)
    for prompts in (PROMPTS, PROMPTS[:1]) if kind == "moe" else (PROMPTS,):
        expected = io.StringIO()
        run(
            Request(checkpoint=tmp_path, prompts=prompts, max_new_tokens=12, sampling=sampling),
            expected,
            io.StringIO(),
        )
        ended = torchrun(tmp_path, *prompts)
        assert ended.returncode == 0, ended.stderr.decode()
        assert ended.stdout.decode() == expected.getvalue()
    where = " on the first rank" if kind == "moe" and len(prompts) > 1 else ""
    assert f"prompt tokens{where}, first new ones after" in ended.stderr.decode()


@pytest.fixture
def rank_of_one(monkeypatch):
    """A run of torchrun with a single rank, in this process."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with ranks_of_this_run(torch.device("cpu")) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("kind", "num_ranks", "sentence"),
    [
        ("dense", 2, "expected a model with experts to share out among 2 ranks"),
        ("moe", 7, "expected at most 6 ranks, one for each expert, got 7"),
    ],
)
def test_models_that_do_not_go_with_the_number_of_ranks(kind, num_ranks, sentence, rank_of_one):
    rank_of_one.size = num_ranks
    with pytest.raises(UserError, match=sentence):
        rank_of_one.share_out(tiny_model(kind).config)
