# SPDX-License-Identifier: Apache-2.0
"""Two ranks per site train what one does, whether they keep all parameters or shards of them."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_pool import (
    RANKS,
    DecoderTask,
    Order,
    RankPool,
    make_checkpoint,
    settings,
    train_alone,
)
from ranks_program import configuration

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.launch import train

pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM = {"placement": "random", "shuffle_every": 2, "moved_warmup_steps": 4}
"""Experts move at the beginning of the third round, which is too short to warm them up."""


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def order(parallel="ddp", task=None, until=3, ranks=RANKS, **options):
    """``parallel`` may end with ", spread": then every rank has one of a site's two experts."""
    paths = {key: options.pop(key) for key in ("resume", "folder") if key in options}
    parallel, _, spread = parallel.partition(", ")
    config = settings(
        ranks_per_site=ranks, parallel=parallel, spread_experts=bool(spread), **options
    )
    return Order(config, task or DecoderTask(), until, **paths)


def leaders(reports):
    return [site[0] for site in reports]


def assert_close(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_training(reports, expected, tolerance=1e-12):
    for mine, theirs in zip(reports, expected, strict=True):
        assert_close(mine.values, theirs.values, tolerance)
        assert_close(mine.state, theirs.state, tolerance)
        assert mine.losses == pytest.approx(theirs.losses, rel=tolerance)
        assert mine.tokens == theirs.tokens
        assert mine.validation == pytest.approx(theirs.validation, rel=tolerance)


@pytest.fixture(scope="module")
def alone():
    """Random placement in float64 with one rank per site."""
    return train_alone(order(ranks=1, **RANDOM))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_are_one_rank_with_the_same_batch(parallel, pool, alone):
    reports = pool.train(order(parallel, **RANDOM))
    assert_same_training(leaders(reports), alone)
    for site, expected in zip(reports, alone, strict=True):
        for rank in site:
            assert rank.losses == site[0].losses
            assert_close(rank.state, site[0].state, 0)
            assert rank.routing == expected.routing
    sharded = {rank.shards for site in reports for rank in site}
    assert (sharded == {0}) == (parallel == "ddp")


def joined(site):
    """What all ranks of a site have together, as if the first one had it."""
    values = {name: value for rank in reversed(site) for name, value in rank.values.items()}
    state = {name: value for rank in reversed(site) for name, value in rank.state.items()}
    return dataclasses.replace(site[0], values=values, state=state)


@pytest.mark.parametrize("parallel", ["ddp, spread", "fsdp, spread"])
@pytest.mark.parametrize("outer", ["nesterov", "local_adamw"])
def test_ranks_that_share_the_experts_are_one_rank_with_all_of_them(parallel, outer, pool):
    options = {"outer": outer, "full_replica_rounds": 1} | RANDOM
    reports = pool.train(order(parallel, **options))
    assert_same_training(map(joined, reports), train_alone(order(ranks=1, **options)))
    for site in reports:
        of_experts = [{name for name in rank.values if ".experts." in name} for rank in site]
        assert [len(names) for names in of_experts] == [4, 4]  # in two layers, w1 and w2 of one
        assert of_experts[0].isdisjoint(of_experts[1])
        assert site[0].losses == site[1].losses


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("outer", ["nesterov", "local_adamw"])
def test_after_a_meeting_all_hold_the_same_bits(parallel, outer, pool):
    task = DecoderTask(torch.float32, auxiliary=True)
    reports = pool.train(order(parallel, task, outer=outer, **RANDOM))
    for site in reports:
        for rank in site[1:]:
            assert_close(rank.values, site[0].values, 0)
            assert rank.digests == {}
    first, second = leaders(reports)
    assert first.digests["shared"] == second.digests["shared"]
    common = [name for name in first.state if name in second.state and "exp_avg" in name]
    assert common
    same = [torch.equal(first.state[name], second.state[name]) for name in common]
    assert all(same) == (outer == "local_adamw")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "fsdp, spread"])
def test_gradients_are_averaged_over_the_ranks_and_then_over_the_sites(parallel, pool):
    synchronous = {"strategy": "ddp", "overlap": 2, "rounds": 1}
    reports = pool.train(order(parallel, until=1, **synchronous))
    expected = train_alone(order(until=1, ranks=1, **synchronous))
    assert_same_training(map(joined, reports), expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_tokens_travel_between_the_ranks_of_all_sites_as_if_every_rank_had_every_expert(
    parallel, pool
):
    """Each of the four experts is on another rank; the same text as with ddp."""
    reports = pool.train(order(parallel, until=2, strategy="ep", overlap=1, rounds=2))
    expected = train_alone(order(until=2, ranks=1, strategy="ddp", overlap=2, rounds=2))
    homes = {}
    for site, right in zip(reports, expected, strict=True):
        ours = joined(site)
        assert ours.losses == pytest.approx(right.losses, rel=1e-12)
        assert ours.validation == pytest.approx(right.validation, rel=1e-12)
        assert_close(ours.values, {name: right.values[name] for name in ours.values})
        assert_close(ours.state, {name: right.state[name] for name in ours.state})
        for rank in site:
            for name in rank.values:
                if ".experts." in name:
                    homes.setdefault(name, []).append(rank)
    assert len(homes) == 2 * 4 * 2  # layers, experts, w1 and w2
    assert all(len(ranks) == 1 for ranks in homes.values())


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp", None), ("ddp", "fsdp, spread"), ("fsdp, spread", "ddp"), (None, "fsdp")],
)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(before, after, pool, alone, tmp_path):
    """None: one rank per site."""

    def part(parallel, until, **paths):
        if parallel is None:
            return train_alone(order(until=until, ranks=1, **RANDOM, **paths))
        return list(map(joined, pool.train(order(parallel, until=until, **RANDOM, **paths))))

    folder = tmp_path / "incomplete"
    folder.mkdir()
    first = part(before, 2, folder=folder)
    records = [record for report in first for record in report.records]
    checkpoint = make_checkpoint(order(until=2, folder=folder, **RANDOM), records)
    rest = part(after, 3, resume=checkpoint)
    for mine, whole_run in zip(rest, alone, strict=True):
        assert_close(mine.values, whole_run.values)
        assert_close(mine.state, whole_run.state)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "ddp, spread"])
def test_a_rank_whose_loss_is_not_finite_fails_its_site_for_the_round(parallel, pool):
    task = DecoderTask(torch.float32, bad=[(1, 4, 3)])  # second round, the second rank's sequence
    reports = pool.train(order(parallel, task))
    for site, ranks in enumerate(reports):
        for rank in ranks:
            assert rank.rejected == [set(), {1}, set()]
            assert [math.isnan(loss) for loss in rank.losses] == [
                site == 1 and step in (4, 5) for step in range(9)
            ]
            assert all(torch.isfinite(value).all() for value in rank.values.values())
            common = rank.values.keys() & ranks[0].values.keys()
            assert {"embedding.weight", "norm.weight"} < common
            for name in common:
                assert torch.equal(rank.values[name], ranks[0].values[name])


def test_a_mistake_ends_all_ranks_with_the_same_sentence(pool, tmp_path):
    everywhere_bad = DecoderTask(bad=[(0, 1, 0), (1, 1, 3)])
    unwritable = order(until=1, folder=tmp_path / "missing")
    for wrong, sentence in (
        (order(task=everywhere_bad), "no longer finite"),
        (unwritable, "write"),
    ):
        for site in pool.train(wrong):
            assert all(isinstance(rank, UserError) for rank in site)
            assert {sentence in str(rank) for rank in site} == {True}
            assert len({str(rank) for rank in site}) == 1


def test_under_torchrun_the_leaders_report_what_sites_of_one_rank_would(tmp_path):
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={2 * RANKS}"]
    program = Path(__file__).with_name("ranks_program.py")
    ranks = subprocess.run(
        [sys.executable, *command, program, tmp_path / "ranks", "fsdp"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ranks.returncode == 0, ranks.stderr
    summary = train(configuration(str(tmp_path / "alone")), task=DecoderTask())
    actual, expected = (Checkpoint(find_checkpoint(tmp_path / run)) for run in ("ranks", "alone"))
    assert_close(actual.model(), expected.model())
    for site in range(2):
        assert_close(actual.state(site), expected.state(site))
    assert actual.manifest["totals"]["tokens"] == expected.manifest["totals"]["tokens"]
    for key in ("loss", "site_losses"):
        assert actual.manifest["summary"][key] == pytest.approx(summary[key], rel=1e-12)
