# SPDX-License-Identifier: Apache-2.0
"""Who counts as lost: the silent, and those that live but do not get on; not those that wait."""

import pytest

from fomoe.federation.launch.watch import Beat, Watch

NAMES = {0: "site 0", 2: "site 2"}


def watch(timeout=10.0):
    return Watch(NAMES, timeout, interval=1.0, now=0.0)


def beat(count, turn=0, doing="step 3", allowed=10.0):
    return Beat(count, turn, doing, allowed)


def test_a_beat_survives_its_journey():
    assert Beat.decode(beat(7, turn=2).encode().encode()) == beat(7, turn=2)
    assert Beat.decode(beat(7, allowed=None).encode().encode()).allowed is None


def test_a_site_that_is_silent_for_longer_than_the_timeout_is_lost():
    seen = watch()
    for now in range(1, 14):
        seen.see([beat(now, turn=now), beat(min(now, 3), turn=3, doing="step 17")], float(now))
        assert seen.lost() is None  # site 2 was last heard at 3
    seen.see([beat(14, turn=14), beat(3, turn=3, doing="step 17")], 14.0)
    assert seen.lost() == (
        2,
        "site 2 has given no sign of life for 10 s (the last one: step 17)",
    )


def test_when_somebody_is_known_to_be_lost_a_few_missing_beats_tell_who():
    seen = watch()
    for now in range(1, 9):
        seen.see([beat(now, turn=now), beat(min(now, 2))], float(now))
    assert seen.lost() is None
    assert seen.suspect().member == 2
    assert watch().suspect() is None


def test_a_site_that_lives_but_does_not_get_on_hangs_and_those_that_wait_for_it_do_not():
    seen = watch()
    for now in range(1, 13):
        waiting = beat(now, doing="the meeting of round 1", allowed=None)
        seen.see([waiting, beat(now, doing="step 17")], float(now))
        assert (seen.lost() is None) == (now <= 11)
    assert seen.lost() == (
        2,
        "site 2 hangs: it lives, but has not got any further than step 17 for 10 s",
    )


def test_everyone_may_wait_for_as_long_as_the_bytes_take():
    seen = watch()
    for now in range(1, 100):
        seen.see([beat(now, allowed=None), beat(now, allowed=None)], float(now))
    assert seen.lost() is None


def test_a_longer_start_is_allowed():
    seen = watch()
    for now in range(1, 100):
        seen.see([beat(now, turn=now), beat(now, doing="its start", allowed=300.0)], float(now))
    assert seen.lost() is None


@pytest.mark.parametrize("stopped", [8.0, 1000.0])
def test_a_process_that_was_stopped_itself_blames_nobody(stopped):
    seen = watch()
    seen.see([beat(1), beat(1)], 1.0)
    seen.see([beat(1), beat(1)], 1.0 + stopped)
    assert seen.lost() is None
    for second in range(1, 12):
        seen.see([beat(1 + second, turn=second), beat(1)], 1.0 + stopped + second)
    assert seen.lost().member == 2
