# SPDX-License-Identifier: Apache-2.0
"""Every variant of the algorithm against the oracle, bit for bit: sites in threads, fp32.

Compared are parameters, outer momenta, every site's AdamW state, what codecs lost, and who was
rejected. The same through processes and files: test_exactness.py.
"""

import dataclasses
import math

import pytest
import torch
from in_process import train_in_threads
from nano_task import NanoTask, batch, joined_pieces, nano, settings
from test_exactness import assert_equal_to_the_bit

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = nano.Config(
    sites=4, overlap=2, rounds=4, local_steps=2, warmup=2, num_experts=8, top_k=2, dim=16,
    expert_dim=12,
)  # fmt: skip
RANDOM = {"placement": "random", "moved_warmup_steps": 3}
VARIANTS = {
    "nesterov": {},
    "average": {"outer": "average"},
    "local AdamW": {"outer": "local_adamw"},
    "partitioned router": {"router": "partitioned"},
    "partitioned, fewer residents than top-k": {"router": "partitioned", "overlap": 1, "top_k": 3},
    "random": RANDOM,
    "random, every second round": RANDOM | {"shuffle_every": 2},
    "random, one holder": RANDOM | {"overlap": 1},
    "random, partitioned": RANDOM | {"router": "partitioned"},
    "random, average": RANDOM | {"outer": "average"},
    "random, local AdamW": RANDOM | {"outer": "local_adamw"},
    "full replicas first": {"full_replica_rounds": 2},
    "full replicas first, then random": RANDOM | {"full_replica_rounds": 1},
    "rows of holders": {"router_mean": "holders"},
    "rows of holders, random": RANDOM | {"router_mean": "holders"},
    "rows rescaled": {"router_mean": "rescaled"},
    "scaled expert steps": {"scale_expert_steps": True},
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int4, random": RANDOM | {"codec": "int4"},
    "int8, average": {"codec": "int8", "outer": "average"},
    "int8, rows of holders, random": RANDOM | {"codec": "int8", "router_mean": "holders"},
    "diloco, int4": {"strategy": "diloco", "codec": "int4"},
    "ddp": {"strategy": "ddp"},
    "three sites, sgd": {"sites": 3, "num_experts": 6, "inner": "sgd"},
}


def run_both(config, task, batches, folder):
    expected = nano.train(config, batches)
    return train_in_threads(settings(config, folder), task), expected


def assert_same(config, sites, expected):
    for site in sites:
        held = {tensor.name: tensor.value for tensor in site.tensors}
        assert_equal_to_the_bit(held, {name: expected.parameters[name] for name in held})
    names = {name for site in sites for name in (tensor.name for tensor in site.tensors)}
    assert names == expected.parameters.keys()
    momenta: dict[str, torch.Tensor] = {}
    for site in sites:
        momenta |= site.meetings.outer.momentum
    assert_equal_to_the_bit(joined_pieces(momenta, config), expected.momenta)
    for site, (_, states) in zip(sites, expected.sites, strict=True):
        known = {f"{k}/{name}": x for name, state in states.items() for k, x in state.items()}
        assert_equal_to_the_bit(without_ages(site.optimizer.state()), known)


def without_ages(state):
    return {name: value for name, value in state.items() if not name.startswith("age/")}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_trainer_equals_the_oracle(changes, tmp_path):
    config = dataclasses.replace(SMALL, **changes)
    sites, expected = run_both(config, NanoTask(config), batch, tmp_path)
    assert_same(config, sites, expected)


FAULTS = {
    "loss": lambda loss: loss * math.nan,
    "loss, but not its gradient": lambda loss: loss + math.inf,
    "gradient, but not the loss": lambda loss: loss + (loss * 0).sqrt(),
}
"""What of a step is not finite."""


def poisoned_batch(site, step):
    """Site 1 sees tokens of 255 in its fourth step, the last of its second round."""
    tokens = batch(site, step)
    return tokens if (site, step) != (1, 3) else tokens.fill_(255)


class PoisonedTask(NanoTask):
    def batch(self, site, step):
        return poisoned_batch(site, step)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, "loss"),
        (RANDOM, "loss"),
        ({"strategy": "ddp"}, "loss"),
        ({"codec": "int8"}, "loss"),
        ({"strategy": "ddp"}, "loss, but not its gradient"),
        ({"outer": "local_adamw"}, "gradient, but not the loss"),
    ],
)
def test_the_trainer_leaves_out_whom_the_oracle_leaves_out(changes, fault, monkeypatch, tmp_path):
    config = dataclasses.replace(SMALL, **changes)
    original = torch.nn.functional.cross_entropy

    def poisoned(logits, labels):
        loss = original(logits, labels)
        return FAULTS[fault](loss) if (labels == 255).any() else loss

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", poisoned)
    sites, expected = run_both(config, PoisonedTask(config), poisoned_batch, tmp_path)
    assert expected.rejected == [(), (1,), (), ()]
    assert_same(config, sites, expected)
