# SPDX-License-Identifier: Apache-2.0
"""Which rank of torchrun is in which site, and that all who join belong to the same attempt."""

import multiprocessing
import threading

import pytest
from rank_program import sums_over_groups

from fomoe.errors import SiteFailed, UserError
from fomoe.federation.launch.membership import Newcomer, Seat, assign
from fomoe.federation.launch.roll import call_the_roll
from fomoe.federation.launch.store import HOST, connect, store_on_this_machine


def newcomers(machines, site_of_machine=None):
    """Ranks by torchrun's order; ``machines`` gives the number of ranks of each."""
    return [
        Newcomer(machine, len(machines), (site_of_machine or {}).get(machine), process=0)
        for machine, ranks in enumerate(machines)
        for _ in range(ranks)
    ]


def test_on_one_machine_consecutive_ranks_form_a_site():
    assert assign(newcomers([4]), sites=2, ranks_per_site=2) == [
        Seat(0, 0), Seat(0, 1), Seat(1, 0), Seat(1, 1),
    ]  # fmt: skip


def test_with_as_many_machines_as_sites_each_is_one():
    seats = assign(newcomers([2, 2, 2]), sites=3, ranks_per_site=2)
    assert [seat.site for seat in seats] == [0, 0, 1, 1, 2, 2]
    assert [seat.rank(2) for seat in seats] == [0, 1, 2, 3, 4, 5]


def test_a_machine_can_be_told_its_site_and_ranks_are_numbered_by_site():
    told = newcomers([1, 1], site_of_machine={0: 1, 1: 0})
    seats = assign(told, sites=2, ranks_per_site=1)
    assert [seat.rank(1) for seat in seats] == [1, 0]


def test_a_site_can_extend_over_machines():
    told = newcomers([2, 1, 1], site_of_machine={0: 1, 1: 0, 2: 0})
    assert assign(told, sites=2, ranks_per_site=2) == [
        Seat(1, 0), Seat(1, 1), Seat(0, 0), Seat(0, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("machines", "told", "sites", "ranks_per_site", "sentence"),
    [
        ([3], None, 4, 1, r"started 3 ranks, .*sites = 4 .*ranks_per_site = 1 needs 4"),
        ([3, 1], None, 2, 2, r"site 0 has 3 ranks of torchrun, but .*ranks_per_site = 2"),
        ([1, 1], {0: 0, 1: 0}, 2, 1, r"site 0 has 2 ranks of torchrun"),
        ([1, 1], {0: 0, 1: 2}, 2, 1, r"--site 2 does not exist: .* from 0 to 1"),
        ([1, 1], {0: -1}, 2, 1, r"--site -1 does not exist"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fill_the_sites_are_refused(
    machines, told, sites, ranks_per_site, sentence
):
    with pytest.raises(UserError, match=sentence):
        assign(newcomers(machines, told), sites, ranks_per_site)


@pytest.fixture
def port():
    store = store_on_this_machine()
    yield store.port
    del store


def roll_call(port, ranks, seconds=20.0):
    """What every one of these ranks, as threads, gets: (attempt, what all brought)."""
    answers = {}

    def answer(rank):
        store = connect(HOST, port, "test", seconds)
        answers[rank] = call_the_roll(store, rank, len(ranks), ranks[rank], seconds)

    threads = [threading.Thread(target=answer, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_everyone_learns_what_all_have_brought(port):
    answers = roll_call(port, ["a", "b", "c"])
    assert len({attempt for attempt, _ in answers.values()}) == 1
    assert [brought for _, brought in answers.values()] == [["a", "b", "c"]] * 3


def test_after_a_restart_the_signatures_of_the_last_attempt_do_not_count(port):
    before = roll_call(port, ["a", "b", "c"])
    after = roll_call(port, ["d", "e", "f"])
    assert [brought for _, brought in after.values()] == [["d", "e", "f"]] * 3
    assert before[0][0] != after[0][0]


def test_ranks_that_are_missing_are_named(port):
    store = connect(HOST, port, "test", 5.0)
    roll_call(port, ["a", "b", "c"])  # an earlier attempt, whose signatures are still there
    with pytest.raises(SiteFailed, match=r"rank 1, 2 of torchrun's 3 ranks did not join within"):
        call_the_roll(store, 0, 3, "d", seconds=0.3)


def test_leaders_meet_the_other_sites_and_the_ranks_of_a_site_each_other(port):
    """Rank r contributes 10 ** r; sites 0 and 1 have the ranks 0, 1 and 2, 3."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fomoe.federation.launch.site_process"])
    pipes = []
    for seat in (Seat(1, 1), Seat(0, 0), Seat(0, 1), Seat(1, 0)):
        mine, theirs = context.Pipe()
        arguments = (port, seat, 2, 2, theirs)
        context.Process(target=sums_over_groups, args=arguments, daemon=True).start()
        pipes.append(mine)
    assert [pipe.recv() for pipe in pipes] == [
        {"inside": (1, 1100)},
        {"leaders": (0, 101), "inside": (0, 11)},
        {"inside": (1, 11)},
        {"leaders": (1, 101), "inside": (0, 1100)},
    ]
