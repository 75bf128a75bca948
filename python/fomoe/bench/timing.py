# SPDX-License-Identifier: Apache-2.0
"""Contenders timed in turns, and the numbers drawn from their times.

On a machine that others use too, two times are comparable only when they were taken a moment apart.
So every repetition runs all contenders on the same batch, and a ratio is the median of the ratios
within the repetitions.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fomoe.bench.clock import Call, Clock, seconds_of

WARMUPS = 3
MIN_REPETITIONS = 7
# A contender that takes SLOW_FACTOR times as long as the first one, and SLOW_SECONDS, is run in one
# warm-up and SLOW_REPETITIONS only: it is not worth most of the time there is.
SLOW_FACTOR = 4
SLOW_SECONDS = 0.25
SLOW_REPETITIONS = 3

Batch = TypeVar("Batch")
Key = TypeVar("Key")


@dataclass(kw_only=True, slots=True, frozen=True)
class Plan:
    """When a case has been repeated enough: after ``repetitions``, or else after ``seconds``."""

    seconds: float = 10.0  # timed, without slow contenders; but at least MIN_REPETITIONS
    repetitions: int | None = None

    def is_enough(self, repetitions: int, seconds: float) -> bool:
        if self.repetitions is not None:
            return repetitions >= self.repetitions
        return repetitions >= MIN_REPETITIONS and seconds >= self.seconds


class Spread(NamedTuple):
    """Median, quartiles (interpolated linearly) and the smallest of some numbers."""

    median: float
    low: float
    high: float
    best: float


def spread(numbers: Sequence[float]) -> Spread:
    low, median, high = np.percentile(numbers, [25, 50, 75])
    return Spread(float(median), float(low), float(high), min(numbers))


def paired_ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times faster the second is: the spread of the ratios within the repetitions.

    One of the two may have stopped early: the repetitions that both have count.
    """
    return spread([a / b for a, b in zip(slower, faster, strict=False)])


def interleave(
    contenders: Mapping[Key, Callable[[Batch], Call]],
    draw: Callable[[], Batch],
    plan: Plan,
    clock: Clock | None = None,
) -> dict[Key, list[float]]:
    """Seconds each contender took in each repetition, after some that are not counted.

    Parameters
    ----------
    contenders
        By name, a function that gets the batch, does what is not to be timed, and returns what is.
    draw
        A new batch for each repetition. The number of rows of an expert is thus never the same
        twice, as in training and serving: a matrix library that prepares code for each size pays.
    plan
    clock
        Of the device they run on; the CPU's by default.
    """
    clock = clock or seconds_of
    times: dict[Key, list[float]] = {name: [] for name in contenders}

    def run(order: Iterable[Key]) -> dict[Key, float]:
        batch = draw()
        return {name: clock(contenders[name](batch)) for name in order}

    with _no_garbage_collection():
        first = run(contenders)
        limit = max(SLOW_FACTOR * next(iter(first.values())), SLOW_SECONDS)
        quick = [name for name in contenders if first[name] <= limit]
        for _ in range(WARMUPS - 1):
            run(quick)
        repetition, spent = 0, 0.0
        while not plan.is_enough(repetition, spent):
            entrants = list(contenders) if repetition < SLOW_REPETITIONS else quick
            taken = run(in_turns(entrants, repetition))
            for name, seconds in taken.items():
                times[name].append(seconds)
            spent += sum(taken[name] for name in quick)
            repetition += 1
    return times


def in_turns(names: Sequence[Key], repetition: int) -> list[Key]:
    """The names in an order in which, over the repetitions, each comes after each equally often.

    What ran before leaves its traces in cache and allocator. This is Williams's design: 0, n - 1,
    1, n - 2, ..., shifted by one each repetition, and reversed in every second cycle.
    """
    count = len(names)
    zigzag = [place // 2 if place % 2 == 0 else count - 1 - place // 2 for place in range(count)]
    order = [names[(index + repetition) % count] for index in zigzag]
    return order[::-1] if repetition // count % 2 else order


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch, and with it fomoe's ops, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
