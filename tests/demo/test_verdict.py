# SPDX-License-Identifier: Apache-2.0
"""The demo's claims are checked against the numbers, and a claim that fails says so."""

import copy

from fomoe.demo.verdict import tensor_bytes_per_site, verdicts


def summary(strategy, loss, shared, memory):
    return {
        "strategy": strategy,
        "loss": loss,
        "local_steps": 10,
        "bigram_entropy": 2.4,
        "bytes_by_class": {"shared": shared, "expert": 0, "tokens": 0, "metrics": 12345},
        "memory_per_site": [{"parameters": memory, "peak_rss": 10**9}],
    }


GOOD = {
    "ddp": summary("ddp", 1.9, 4000, 300),
    "ep": summary("ep", 1.9, 9000, 100),
    "diloco": summary("diloco", 2.0, 400, 300),
    "fomoe": summary("fomoe", 2.1, 200, 150),
}


def failing(runs):
    return [index for index, verdict in enumerate(verdicts(runs)) if not verdict["holds"]]


def test_good_numbers_hold_every_claim():
    assert failing(GOOD) == []
    assert "4,000" in verdicts(GOOD)[1]["claim"]
    assert "+5.0%" in verdicts(GOOD)[5]["claim"]


def test_each_claim_can_fail_by_itself():
    for index, (strategy, key, value) in enumerate(
        [
            ("diloco", "loss", 2.5),
            ("ddp", "shared", 4001),
            ("ep", "loss", 1.92),
            ("fomoe", "shared", 400),
            ("fomoe", "parameters", 300),
            ("fomoe", "loss", 2.11),
        ]
    ):
        runs = copy.deepcopy(GOOD)
        holder = {
            "loss": runs[strategy],
            "shared": runs[strategy]["bytes_by_class"],
            "parameters": runs[strategy]["memory_per_site"][0],
        }[key]
        holder[key] = value
        assert failing(runs) == [index]


def test_memory_is_the_sum_of_the_tensor_classes_of_the_largest_site():
    sites = [{"a": 1, "b": 2, "peak_rss": 99}, {"a": 4, "b": 0, "peak_rss": 1}]
    assert tensor_bytes_per_site({"memory_per_site": sites}) == 4
