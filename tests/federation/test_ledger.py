# SPDX-License-Identifier: Apache-2.0
"""Measured bytes against the integer of the design, and what crosses to whom."""

import dataclasses

import pytest
from nano_task import NanoTask, json_lines, nano, train_sites

from fomoe.federation.ledger import EXCHANGE_CLASSES, expected_round_bytes
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.placement import fixed

BASE = nano.Config(
    sites=4, overlap=2, rounds=2, local_steps=3, warmup=1, num_experts=8, top_k=2, dim=16,
    expert_dim=8,
)  # fmt: skip


def measured(config, folder):
    """Exchange bytes by (round, class), summed over the sites, from the ledger file."""
    train_sites(config, folder)
    totals = {}
    for line in json_lines(folder / "ledger.jsonl"):
        if line["class"] in EXCHANGE_CLASSES and line["bytes"]:
            key = line["round"], line["class"]
            totals[key] = totals.get(key, 0) + line["bytes"]
    return totals


def expected(config):
    tensors = federated_tensors(NanoTask(config).build_model(None))
    shared = sum(4 * t.num_elements for t in tensors if t.expert is None)
    of_one = [tensor for tensor in tensors if (tensor.layer, tensor.expert) == (0, 0)]
    one_expert = sum(4 * t.num_elements for t in of_one if not t.on_every_site)
    one_row = sum(4 * t.num_elements for t in of_one if t.on_every_site)
    overlap = config.overlap if config.strategy == "fomoe" else config.sites
    placement = fixed(config.num_layers, config.num_experts, config.sites, overlap)
    return expected_round_bytes(
        placement, shared_bytes=shared, expert_bytes=one_expert, router_bytes=one_row
    )


def test_the_formula_on_a_case_worked_by_hand():
    # 3 sites, 2 holders: 100 B shared cross 2*(3-1) times; 2 layers of 3 experts of 10 B cross
    # 2*(2-1) times; every site sends its 8-byte token count to the 2 others.
    # A router row of 1 B comes from 2 others, or from the other holder only, and goes to 2 others.
    placement = fixed(2, 3, sites=3, overlap=2)
    sizes = {"shared_bytes": 100, "expert_bytes": 10, "router_bytes": 1}
    formula = expected_round_bytes(placement, **sizes)
    assert formula == {"shared": 400, "router": 24, "expert": 120, "tokens": 48}
    of_holders = expected_round_bytes(placement, **sizes, router_mean="holders")
    assert of_holders == formula | {"router": 18}


@pytest.mark.parametrize(("overlap", "sites"), [(1, 4), (2, 4), (4, 4), (2, 3)])
def test_every_round_sends_exactly_the_expected_bytes(overlap, sites, tmp_path):
    config = dataclasses.replace(BASE, overlap=overlap, sites=sites, num_experts=2 * sites)
    formula = expected(config)
    assert measured(config, tmp_path) == {
        (r, name): formula[name] for r in range(config.rounds) for name in formula if formula[name]
    }


def test_ddp_sends_local_steps_times_what_diloco_sends(tmp_path):
    ddp = measured(dataclasses.replace(BASE, strategy="ddp"), tmp_path / "ddp")
    diloco = measured(dataclasses.replace(BASE, strategy="diloco"), tmp_path / "diloco")
    assert ddp == {key: BASE.local_steps * value for key, value in diloco.items()}


def test_sites_agree_on_the_shared_tensors_and_the_ledger_says_so(tmp_path):
    train_sites(BASE, tmp_path)
    for round_index in range(BASE.rounds):
        digests = {
            line["sha256"]
            for line in json_lines(tmp_path / "ledger.jsonl")
            if line["round"] == round_index and line["class"] == "shared"
        }
        assert len(digests) == 1
