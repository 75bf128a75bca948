# SPDX-License-Identifier: Apache-2.0
"""What sites tell the coordinator: every byte counted in its round, who had a part, who agrees."""

import json

import pytest

from fomoe.errors import SiteFailed
from fomoe.federation.launch.channel import Reporter, decode, encode, timing
from fomoe.federation.ledger import SiteLedger, check_agreement, contributors, round_lines
from fomoe.federation.placement import fixed

# Two layers of four experts. Layer 0: experts 0 and 2 on sites 0, 1; experts 1 and 3 on sites 2, 3.
# Layer 1, shifted by one: experts 0 and 2 on sites 1, 2; experts 1 and 3 on sites 0, 3.
RING = fixed(2, 4, sites=4, overlap=2)


def test_experts_come_from_the_sites_that_hold_one_of_mine():
    assert contributors("expert", 0, RING) == [0, 1, 3]
    assert contributors("expert", 2, RING) == [1, 2, 3]
    alone = fixed(2, 4, sites=4, overlap=1)
    assert contributors("expert", 2, alone) == [2]


def test_everyone_has_a_part_in_shared_tensors_and_nobody_else_in_what_the_coordinator_gets():
    assert contributors("shared", 2, RING) == contributors("tokens", 2, RING) == [0, 1, 2, 3]
    assert contributors("metrics", 2, RING) == contributors("evaluation", 2, RING) == [2]


def test_the_ledger_has_a_line_per_site_and_class_with_what_was_agreed_on():
    digests = {"shared": "aa", "expert": {"0,1": "bb"}}
    report = {"tokens": 32, "bytes": {"shared": 10, "metrics": 5}, "digests": digests}
    two = fixed(1, 2, sites=2, overlap=2)
    lines = round_lines(7, [report, report], two)
    assert lines[:2] == [
        {
            "round": 7, "site": 0, "class": "metrics", "bytes": 5, "tokens": 32,
            "contributors": [0],
        },
        {
            "round": 7, "site": 0, "class": "shared", "bytes": 10, "tokens": 32,
            "contributors": [0, 1], "sha256": "aa",
        },
    ]  # fmt: skip
    assert [line["site"] for line in lines] == [0, 0, 1, 1]


def test_only_holders_of_the_same_experts_have_to_agree():
    sites = [{"shared": "aa", "expert": experts} for experts in ({"0,1": "b"}, {"0,1": "b"})]
    check_agreement(3, sites)
    check_agreement(3, [*sites, {"shared": "aa", "expert": {"2": "c"}}])
    sites[1]["expert"] = {"0,1": "x"}
    with pytest.raises(SiteFailed, match=r"sites 0 and 1 hold different .* sites 0,1"):
        check_agreement(3, sites)


class Recorder:
    """A channel to nowhere."""

    files_travel = False

    def __init__(self):
        self.messages = []

    def transmit(self, message):
        self.messages.append(message)

    def end_round(self, records):
        self.records = records


def round_report(seconds):
    timings = {"seconds": timing(seconds), "peak_rss": timing(123456789)}
    return {"round": 0, "timings": timings, "memory": {"parameters": 4}}


def test_a_message_counts_in_the_round_it_belongs_to():
    channel, ledger = Recorder(), SiteLedger()
    reporter = Reporter(channel, ledger)
    reporter.step(loss=1.5)
    reporter.round(round_report(1.0), [])
    step, round_ = channel.messages
    report = json.loads(round_)
    assert round_.endswith(b', "bytes": {"metrics": %d}}' % report["bytes"]["metrics"])
    without_counts = len(encode("round", round_report(1.0) | {"files": []}))
    assert report["bytes"] == {"metrics": len(step) + without_counts}
    assert ledger.close_round() == {}


def test_a_report_has_as_many_bytes_however_long_the_round_took():
    sizes = {len(encode("round", round_report(s))) for s in (0.0, 1e-6, 0.1, 2 / 3, 98765.4321)}
    assert len(sizes) == 1
    report = decode(encode("round", round_report(0.25)))
    assert report["seconds"] == 0.25
    assert report["memory"] == {"parameters": 4, "peak_rss": 123456789}
