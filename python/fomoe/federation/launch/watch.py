# SPDX-License-Identifier: Apache-2.0
"""Who is lost, judged from the signs of life that were seen: no threads, clocks or network here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

__all__ = ["Beat", "Loss", "Watch"]


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life.

    ``count`` grows with every beat, ``turn`` with everything that the process begins to do;
    ``doing`` says what. ``allowed`` is how many seconds that may take, None while it waits for
    others.
    """

    count: int
    turn: int
    doing: str
    allowed: float | None

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> "Beat":
        return Beat(**json.loads(text))


class Loss(NamedTuple):
    """Who is lost, None when it is none of the watched, and how that showed: the beginning of a
    sentence."""

    member: int | None
    sentence: str


@dataclass(slots=True)
class _Seen:
    beat: Beat | None
    beat_at: float
    turn_at: float


class Watch:
    """Says which of the watched is lost.

    One that is silent for ``timeout`` seconds is. So is one that still gives signs of life but has
    been doing the same for longer than it is allowed: it hangs, while those that wait for it are
    excused. All times are of the clock of this process, in seconds.

    Parameters
    ----------
    names
        How a sentence calls the watched, for example ``"site 2"``, by their numbers.
    timeout
        Seconds.
    interval
        Seconds between two beats.
    now
        The time.
    """

    def __init__(
        self, names: Mapping[int, str], timeout: float, interval: float, now: float
    ) -> None:
        self.names = names
        self.timeout = timeout
        self.grace = 5 * interval
        self._looked_at = now
        self._seen = {member: _Seen(None, now, now) for member in names}

    def see(self, beats: Sequence[Beat], now: float) -> None:
        """Take note of everyone's latest beat, in the order of the names."""
        if now - self._looked_at > max(self.timeout / 2, self.grace):
            # It was this process that did not run, stopped by Ctrl-Z perhaps: begin to count anew.
            for seen in self._seen.values():
                seen.beat_at = seen.turn_at = now
        self._looked_at = now
        for seen, beat in zip(self._seen.values(), beats, strict=True):
            if seen.beat is None or seen.beat.turn != beat.turn:
                seen.turn_at = now
            if seen.beat is None or seen.beat.count != beat.count:
                seen.beat_at = now
            seen.beat = beat

    def lost(self) -> Loss | None:
        """Who is lost; None: nobody."""
        return self._silent(self.timeout) or self._hanging()

    def suspect(self) -> Loss | None:
        """As :meth:`lost`, when it is known that somebody is: a few missing beats suffice."""
        return self._silent(self.grace) or self._hanging()

    def _silent(self, limit: float) -> Loss | None:
        silences = {m: self._looked_at - seen.beat_at for m, seen in self._seen.items()}
        member = max(silences, key=silences.__getitem__, default=None)
        if member is None or silences[member] <= limit:
            return None
        last = self._seen[member].beat
        return Loss(
            member,
            f"{self.names[member]} has given no sign of life for {limit:g} s "
            f"(the last one: {'none' if last is None else last.doing})",
        )

    def _hanging(self) -> Loss | None:
        for member, seen in self._seen.items():
            if seen.beat is None or seen.beat.allowed is None:
                continue
            breathes = self._looked_at - seen.beat_at <= self.grace
            if breathes and self._looked_at - seen.turn_at > seen.beat.allowed:
                return Loss(
                    member,
                    f"{self.names[member]} hangs: it lives, but has not got any further than "
                    f"{seen.beat.doing} for {seen.beat.allowed:g} s",
                )
        return None
