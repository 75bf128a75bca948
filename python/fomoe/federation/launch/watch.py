# SPDX-License-Identifier: Apache-2.0
"""Who is lost, judged from the signs of life that were seen: no threads, clocks or network here."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

__all__ = ["Beat", "Watch"]


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
        How a sentence calls the watched, for example ``"site 2"``; they are numbered in this order.
    timeout
        Seconds.
    interval
        Seconds between two beats.
    now
        The time.
    """

    def __init__(self, names: Sequence[str], timeout: float, interval: float, now: float) -> None:
        self.names = names
        self.timeout = timeout
        self.grace = 5 * interval
        self._looked_at = now
        self._seen = [_Seen(None, now, now) for _ in names]

    def see(self, beats: Sequence[Beat], now: float) -> None:
        """Take note of everyone's latest beat, in the order of the names."""
        if now - self._looked_at > max(self.timeout / 2, self.grace):
            # It was this process that did not run, stopped by Ctrl-Z perhaps: begin to count anew.
            for seen in self._seen:
                seen.beat_at = seen.turn_at = now
        self._looked_at = now
        for seen, beat in zip(self._seen, beats, strict=True):
            if seen.beat is None or seen.beat.turn != beat.turn:
                seen.turn_at = now
            if seen.beat is None or seen.beat.count != beat.count:
                seen.beat_at = now
            seen.beat = beat

    def lost(self) -> str | None:
        """Who is lost and how that showed, as the beginning of a sentence; None: nobody."""
        return self._silent(self.timeout) or self._hanging()

    def suspect(self) -> str | None:
        """As :meth:`lost`, when it is known that somebody is: a few missing beats suffice."""
        return self._silent(self.grace) or self._hanging()

    def _silent(self, limit: float) -> str | None:
        silences = [self._looked_at - seen.beat_at for seen in self._seen]
        longest = max(range(len(silences)), key=silences.__getitem__, default=None)
        if longest is None or silences[longest] <= limit:
            return None
        last = self._seen[longest].beat
        return (
            f"{self.names[longest]} has given no sign of life for {limit:g} s "
            f"(the last one: {'none' if last is None else last.doing})"
        )

    def _hanging(self) -> str | None:
        for name, seen in zip(self.names, self._seen, strict=True):
            if seen.beat is None or seen.beat.allowed is None:
                continue
            breathes = self._looked_at - seen.beat_at <= self.grace
            if breathes and self._looked_at - seen.turn_at > seen.beat.allowed:
                return (
                    f"{name} hangs: it lives, but has not got any further than "
                    f"{seen.beat.doing} for {seen.beat.allowed:g} s"
                )
        return None
