# SPDX-License-Identifier: Apache-2.0
"""Contenders in turns, and the arithmetic on their times. No test here looks at a clock."""

from collections import Counter
from itertools import pairwise

import pytest

from fomoe.bench import timing
from fomoe.bench.timing import Plan, in_turns, interleave, num_threads, paired_ratio, spread


def test_a_spread_is_the_median_the_quartiles_and_the_best():
    # Sorted 1 2 3 4 10: the quartiles lie a quarter of the four gaps in.
    assert spread([3, 1, 10, 2, 4]) == (3, 2, 4, 1)
    # Between two numbers, linearly.
    assert spread([2, 4]) == (3, 2.5, 3.5, 2)
    assert spread([7]) == (7, 7, 7, 7)


def test_a_ratio_is_taken_within_repetitions_not_between_medians():
    # The machine was busy in the third: both took ten times as long, and the ratio stays 2.
    theirs, ours = [2.0, 4.0, 40.0], [1.0, 2.0, 20.0]
    assert paired_ratio(theirs, ours) == (2, 2, 2, 2)
    # Ratios 3, 2, 1/2; the ratio of the medians would be 3/3.
    assert paired_ratio([3, 6, 2], [1, 3, 4]) == (2, 1.25, 2.5, 0.5)


def test_a_contender_that_stopped_early_is_compared_where_it_ran():
    assert paired_ratio([4.0, 6.0], [1.0, 2.0, 100.0]).median == 3.5


def test_a_plan_ends_after_its_repetitions_or_else_its_seconds():
    assert not Plan(repetitions=3).is_enough(2, 1e9)
    assert Plan(repetitions=3).is_enough(3, 0)
    assert not Plan(seconds=5).is_enough(100, 4.9)
    assert not Plan(seconds=5).is_enough(6, 1e9)  # quartiles of fewer say nothing
    assert Plan(seconds=5).is_enough(7, 5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_contender_comes_after_every_other_equally_often(count: int):
    names = list("abcde"[:count])
    orders = [in_turns(names, repetition) for repetition in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert len(follows) == count * (count - 1)
    assert len(set(follows.values())) <= 1
    first = Counter(order[0] for order in orders)
    assert len(set(first.values())) == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Every call takes the seconds it returns."""
    monkeypatch.setattr(timing, "seconds_of", lambda call: call())


def test_all_contenders_of_a_repetition_get_the_same_new_batch(clock: None):
    batches = iter(range(100))
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def contender(name: str):
        def prepare(batch: int):
            seen[name].append(batch)
            return lambda: float(batch)

        return prepare

    plan = Plan(repetitions=4)
    times = interleave({n: contender(n) for n in seen}, lambda: next(batches), plan)
    warmups = timing.WARMUPS
    assert seen["a"] == seen["b"] == list(range(warmups + 4))
    assert times["a"] == times["b"] == list(range(warmups, warmups + 4))


def test_a_contender_that_is_far_slower_than_the_first_runs_in_few_repetitions(clock: None):
    seconds = {"ours": 0.1, "near": 0.35, "far": 0.45}
    contenders = {name: (lambda batch, s=s: lambda: s) for name, s in seconds.items()}
    times = interleave(contenders, lambda: None, Plan(repetitions=8))
    assert times == {"ours": [0.1] * 8, "near": [0.35] * 8, "far": [0.45] * 3}
    # Nor does it use up the seconds of the others: 0.45 a repetition, so 10 make 4.5.
    times = interleave(contenders, lambda: None, Plan(seconds=4.4))
    assert [len(times[name]) for name in seconds] == [10, 10, 3]
    # Where all are quick, a slow first call is only the first call.
    seconds |= {"ours": 0.01, "near": 0.02, "far": 0.2}
    contenders = {name: (lambda batch, s=s: lambda: s) for name, s in seconds.items()}
    assert len(interleave(contenders, lambda: None, Plan(repetitions=8))["far"]) == 8


def test_threads_are_set_and_set_back():
    import torch

    before = torch.get_num_threads()
    with num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
