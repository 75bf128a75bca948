# SPDX-License-Identifier: Apache-2.0
"""Two ranks of torchrun make the texts of one process."""

import io
import os
import subprocess
import sys

import pytest
from generation_models import tiny_model

from fomoe.generate import Sampling
from fomoe.generate.command import Request, run
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


def test_a_model_without_experts_is_refused(tmp_path):
    save_model(tiny_model("dense", vocab_size=256), tmp_path)
    ended = torchrun(tmp_path, "a")
    assert ended.returncode != 0
    sentence = "error: torchrun: expected a model with experts to share out among 2 ranks"
    assert sentence in ended.stderr.decode()
