# SPDX-License-Identifier: Apache-2.0
"""Routing health: the numbers of a round, what is found in them, and that a run says so."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from nano_task import NanoTask, nano, settings
from torch import nn

from fomoe.federation.health import (
    PERSISTENCE,
    Finding,
    Reading,
    RoutingHealth,
    dead_experts,
    growing_variation,
    skipping,
    summarize_routing,
    unequal_sites,
    uneven_load,
)
from fomoe.federation.launch import train
from fomoe.nn.statistics import router_statistics

EXPERTS = 4
EVEN = (1000, 1000, 1000, 1000)
COLLAPSED = (3700, 100, 100, 100)


def site(
    counts: Sequence[int] = EVEN,
    resident: Sequence[int] = (0, 1),
    candidates: Sequence[int] = range(EXPERTS),
) -> dict[str, Any]:
    """One site's statistics of one layer."""
    statistics = router_statistics(counts, candidates=candidates, resident=resident, num_rows=0)
    return asdict(statistics)


def two_sites(counts_0: Sequence[int], counts_1: Sequence[int]) -> list[dict[str, Any]]:
    """A layer in which site 0 holds experts 0 and 1, and site 1 the experts 2 and 3."""
    return [site(counts_0, (0, 1)), site(counts_1, (2, 3))]


def full_replicas(counts: Sequence[int]) -> list[dict[str, Any]]:
    return [site(counts, range(EXPERTS))] * 2


def watch(*rounds: list[dict[str, Any]]) -> list[Finding]:
    """Findings after these rounds of a model with one layer."""
    health = RoutingHealth()
    for index, layer in enumerate(rounds):
        health.observe(index, [[each] for each in layer])
    return health.findings


# ---- the numbers ----------------------------------------------------------------------------


def test_the_summary_of_a_round_worked_by_hand():
    # Site 0 chooses only experts 0 and 1, its own; site 1 chooses 0 and 3, and holds 2 and 3.
    layer = two_sites((2, 2, 0, 0), (3, 0, 0, 1))
    (line,) = summarize_routing([[each] for each in layer])
    entropy = [0.5, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)]
    # Loads 1/2, 1/2, 0, 0 deviate by 1/4 from 1/4; 3/4, 0, 0, 1/4 by 1/2, 1/4, 1/4, 0.
    variation = [1.0, math.sqrt((1 / 4 + 1 / 16 + 1 / 16) / 4) * 4]
    assert line == {
        "layer": 0,
        "load": [0.625, 0.25, 0.0, 0.125],
        "load_entropy": pytest.approx(sum(entropy) / 2),
        "load_variation": pytest.approx(sum(variation) / 2),
        "dead_experts": 1,  # expert 2; each site misses two
        "ghost_share": (0 + 3 / 4) / 2,
        "even_ghost_share": 0.5,
        "sites": {
            "load_entropy": [0.5, round(entropy[1], 4)],
            "load_variation": [1.0, round(variation[1], 4)],
            "dead_experts": [2, 2],
            "ghost_share": [0.0, 0.75],
        },
    }


def test_a_site_that_routed_nothing_counts_in_no_mean():
    layer = two_sites((2, 2, 0, 0), (0, 0, 0, 0))
    (line,) = summarize_routing([[each] for each in layer])
    assert (line["load_entropy"], line["ghost_share"], line["dead_experts"]) == (0.5, 0.0, 2)


# ---- one detector each ----------------------------------------------------------------------


def test_a_low_entropy_is_read_at_the_worst_site():
    value, expected, where, is_bad = uneven_load(two_sites(EVEN, COLLAPSED))
    share = 37 / 40
    entropy = -(share * math.log(share) + 3 / 40 * math.log(1 / 40)) / math.log(4)
    assert (value, expected, where, is_bad) == (pytest.approx(entropy), 1, 1, True)
    assert not uneven_load(two_sites(EVEN, (1900, 700, 700, 700))).is_bad  # entropy 0.92


def test_an_expert_is_dead_when_no_site_or_one_site_never_chose_it():
    nobody = two_sites((1, 1, 1, 0), (0, 1, 1, 0))
    assert dead_experts(nobody) == Reading(1, 0, None, True)
    somebody = two_sites((1, 1, 1, 0), (0, 0, 1, 1))
    assert dead_experts(somebody) == Reading(2, 0, 1, True)
    assert dead_experts(two_sites(EVEN, (1, 999, 1500, 1500))) == Reading(0, 0, 0, False)


def test_sites_that_prefer_their_own_experts_lower_the_mean_ghost_share():
    towards = skipping(two_sites((1400, 1400, 600, 600), (600, 600, 1400, 1400)))
    assert towards == Reading(pytest.approx(0.3), 0.5, None, True)
    away = skipping(two_sites((600, 600, 1400, 1400), (1400, 1400, 600, 600)))
    assert away == Reading(pytest.approx(0.7), 0.5, None, True)


def test_a_load_that_all_sites_share_is_no_matter_of_skipping_however_uneven():
    layer = two_sites(COLLAPSED, COLLAPSED)
    assert skipping(layer) == Reading(pytest.approx(0.5), 0.5, None, False)
    # But site 1, without the popular expert, skips 38 of 40 choices, and site 0 but 2.
    assert unequal_sites(layer) == Reading(pytest.approx(2 / 40), 0.5, 0, True)


def test_a_site_is_compared_with_the_skew_of_the_whole_layer():
    # Ghost shares 0.1 and 0.5: both sites turn to their own experts, 0.2 on average, site 0 more.
    layer = two_sites((1800, 1800, 200, 200), EVEN)
    assert unequal_sites(layer) == Reading(pytest.approx(0.1), pytest.approx(0.3), 0, True)
    alike = two_sites((1800, 1800, 200, 200), (200, 200, 1800, 1800))
    assert not unequal_sites(alike).is_bad


def test_a_partitioned_router_has_no_ghosts_to_find():
    layer = [site((5, 5, 0, 0), (0, 1), (0, 1)), site((0, 0, 9, 1), (2, 3), (2, 3))]
    assert not skipping(layer).is_bad
    assert not unequal_sites(layer).is_bad
    assert not dead_experts(layer).is_bad
    assert uneven_load(layer).is_bad  # 0.9, 0.1 over two candidates: entropy 0.47


def test_variation_is_compared_with_what_it_was_unless_it_is_harmless():
    layer = two_sites((1900, 700, 700, 700), (1900, 700, 700, 700))  # variation 0.52
    value = pytest.approx(math.sqrt((0.225**2 + 3 * 0.075**2) / 4) * 4)
    assert growing_variation(layer, 0.4) == Reading(value, 0.4, None, True)
    assert not growing_variation(layer, 0.5).is_bad
    calm = two_sites((1300, 900, 900, 900), (1300, 900, 900, 900))  # variation 0.17
    assert not growing_variation(calm, 0.01).is_bad


# ---- over the rounds ------------------------------------------------------------------------


def test_a_healthy_run_is_silent():
    near = two_sites((1100, 1000, 950, 950), (900, 1000, 1050, 1050))
    assert watch(full_replicas(EVEN), *[near] * 10) == []


def test_a_fault_is_named_once_and_only_when_it_persists():
    even, collapsed = two_sites(EVEN, EVEN), full_replicas(COLLAPSED)
    assert watch(collapsed, collapsed, even, collapsed, collapsed) == []
    (finding,) = watch(even, *[collapsed] * (PERSISTENCE + 4))
    assert (finding.kind, finding.layer, finding.site) == ("uneven_load", 0, 0)
    assert finding.round == PERSISTENCE
    assert finding.sentence == (
        "the routing of layer 0 has collapsed: load entropy 0.25 at site 0, where 1 is even; "
        "raise model.balance_loss_coefficient"
    )


def test_skipping_that_unbalances_is_named_with_the_setting_that_helps():
    even = full_replicas(EVEN)
    towards = two_sites((1400, 1400, 600, 600), (600, 600, 1400, 1400))
    (finding,) = watch(even, even, *[towards] * PERSISTENCE)
    assert (finding.kind, finding.site, finding.expected) == ("skipping", None, 0.5)
    assert finding.sentence == (
        "skipping unbalances the routing of layer 0, towards the experts each site holds: ghost "
        "share 0.30, where 0.50 is even; begin with more rounds of full replicas: "
        "federation.full_replica_rounds, here 2"
    )
    away = two_sites((600, 600, 1400, 1400), (1400, 1400, 600, 600))
    (finding,) = watch(*[away] * PERSISTENCE)
    assert "away from the experts each site holds: ghost share 0.70" in finding.sentence
    assert "federation.full_replica_rounds, here 0" in finding.sentence


def test_dead_experts_and_unequal_sites_are_named():
    dead = two_sites((1333, 1333, 1334, 0), (1333, 1333, 1334, 0))
    found = {finding.kind: finding for finding in watch(*[dead] * PERSISTENCE)}
    assert found.keys() == {"dead_experts", "uneven_load", "unequal_sites"}
    assert "layer 0 has dead experts: no site chose 1 of 4" in found["dead_experts"].sentence
    unequal = found["unequal_sites"]
    assert (unequal.site, unequal.expected) == (0, 0.5)
    assert "federation.full_replica_rounds" in unequal.sentence


def test_full_replica_rounds_are_the_baseline_of_the_variation():
    calm, uneven = (1300, 900, 900, 900), (1900, 700, 700, 700)  # variation 0.17 and 0.52
    later = [two_sites(uneven, uneven)] * PERSISTENCE
    found = watch(full_replicas(uneven), full_replicas(calm), *later)
    growth = next(finding for finding in found if finding.kind == "growing_variation")
    assert (growth.value, growth.expected) == (
        pytest.approx(0.52, abs=0.01),
        pytest.approx(0.173, abs=0.001),
    )
    assert "load variation 0.52, before it was 0.17" in growth.sentence
    assert "growing_variation" not in {f.kind for f in watch(full_replicas(uneven), *later)}


def test_without_full_replica_rounds_the_first_rounds_are_the_baseline():
    calm, uneven = (1300, 900, 900, 900), (1900, 700, 700, 700)
    first, later = [two_sites(calm, calm)] * PERSISTENCE, [two_sites(uneven, uneven)] * PERSISTENCE
    assert "growing_variation" in {finding.kind for finding in watch(*first, *later)}
    assert "growing_variation" not in {finding.kind for finding in watch(*later, *later)}


def test_too_few_choices_to_tell_chance_from_fault_are_left_out():
    few = [site((40, 0, 0, 0), range(EXPERTS))] * 2
    nothing = [site((0, 0, 0, 0), range(EXPERTS))] * 2
    assert watch(*[few] * 5, *[nothing] * 5) == []


def test_what_was_seen_travels_as_json():
    collapsed = [[each] for each in full_replicas(COLLAPSED)]
    straight, resumed = RoutingHealth(), RoutingHealth()
    for index in range(PERSISTENCE + 2):
        straight.observe(index, collapsed)
        resumed.observe(index, collapsed)
        resumed = RoutingHealth.model_validate_json(json.dumps(resumed.model_dump()))
    assert resumed == straight
    assert len(resumed.findings) == 1


# ---- in a run -------------------------------------------------------------------------------


class CollapsedTask(NanoTask):
    """Reports the same routing after every round: layers 0 and 2 have collapsed."""

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"layer": layer, **site(counts, range(EXPERTS))}
            for layer, counts in enumerate((COLLAPSED, EVEN, COLLAPSED))
        ]


def test_a_run_says_what_it_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = nano.Config(
        sites=2, overlap=2, rounds=PERSISTENCE, local_steps=1, warmup=1, num_experts=2, top_k=1,
        dim=16, expert_dim=8,
    )  # fmt: skip
    summary = train(settings(config, tmp_path), task=CollapsedTask(config))

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    warnings = [line for line in lines if line["kind"] == "warning"]
    assert [(line["finding"], line["layer"], line["round"]) for line in warnings] == [
        ("uneven_load", layer, PERSISTENCE - 1) for layer in (0, 2)
    ]
    assert [each["sentence"] for each in summary["routing_findings"]] == [
        line["sentence"] for line in warnings
    ]
    error = capfd.readouterr().err
    assert error.count("warning: round 2: the routing of layer 0 has collapsed") == 1
    assert "layer 2" not in error
