# SPDX-License-Identifier: Apache-2.0
"""The executable paper as a module, and what its tests have in common."""

import importlib.util
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

PATH = Path(__file__).resolve().parents[2] / "examples" / "nano_fomoe.py"
spec = importlib.util.spec_from_file_location("nano_fomoe", PATH)
nano = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = nano
spec.loader.exec_module(nano)

TINY = nano.Config(
    sites=4,
    overlap=2,
    rounds=3,
    local_steps=2,
    warmup=2,
    dim=32,
    num_heads=2,
    num_experts=4,
    expert_dim=24,
    top_k=2,
)


def batches(site, step, sequences=3):
    generator = torch.Generator().manual_seed(100 * step + site)
    return torch.randint(256, (sequences, 17), generator=generator)


def moments(run):
    """One dict per site: every inner AdamW moment by tensor name."""
    return [
        {f"{key}/{n}": x[key] for n, x in state.items() for key in ("exp_avg", "exp_avg_sq")}
        for _, state in run.sites
    ]


def expert_of(name):
    """(layer, expert) of a tensor of an expert; None for others, and for a row of a full router."""
    match = re.fullmatch(r"layers\.(\d+)\.moe\.experts\.(\d+)\.w[12]", name)
    return match and (int(match[1]), int(match[2]))


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        as_bytes = [x.contiguous().view(torch.uint8) for x in (left[name], right[name])]
        assert torch.equal(*as_bytes), f"{name} differs"


def objective(model, batch):
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    return loss + sum(layer.moe.auxiliary_loss for layer in model.layers)
