# SPDX-License-Identifier: Apache-2.0
"""Signs of life through a TCPStore, from threads that run even while a collective blocks.

One thread writes this process's beat and reads everyone else's. A second one talks to nobody: it
notices when the first no longer comes through, as when the host of the store is gone.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from fomoe.federation.launch.store import Store
from fomoe.federation.launch.watch import Beat, Loss, Watch

__all__ = ["CHECKPOINT", "VERDICT", "Heartbeat", "prepare"]

CHECKPOINT, VERDICT = "checkpoint", "verdict"
"""Keys beside the beats: the last complete checkpoint, and why the run ends if it has to."""

_SECONDS_TO_START = 300.0
_LONGEST_INTERVAL = 1.0


def prepare(store: Store, members: int) -> None:
    """Give every key of ``members`` heartbeats its first value, before any of them begins."""
    for member in range(members):
        store.set(f"beat/{member}", Beat(0, 0, "its start", _SECONDS_TO_START).encode())
    for key in (CHECKPOINT, VERDICT):
        store.set(key, "")


class Heartbeat:
    """Gives signs of life and watches for those of others, as a context manager.

    A process has ``max(timeout, 300)`` seconds for its start, with imports, text and model, and
    then ``timeout`` for everything else that it says it does.

    Parameters
    ----------
    store
        A connection of its own, :func:`prepare`-d.
    me
        The number of this process.
    watched
        The names of the watched by their numbers.
    timeout
        Seconds without a sign of life after which one is lost.
    store_name
        Who is lost when the store no longer answers.
    lost
        Called once, from a thread, with who is lost; or with None, when somebody has left a verdict
        in the store.
    """

    def __init__(
        self,
        store: Store,
        me: int,
        watched: Mapping[int, str],
        timeout: float,
        store_name: str,
        lost: Callable[[Loss | None], None],
    ) -> None:
        self.timeout = timeout
        self.interval = min(_LONGEST_INTERVAL, timeout / 10)
        self.checkpoint = self.verdict = ""
        self._watch = Watch(watched, timeout, self.interval, time.monotonic())
        self._store = store
        self._my_key = f"beat/{me}"
        self._keys = [CHECKPOINT, VERDICT, *(f"beat/{member}" for member in watched)]
        self._store_name = store_name
        self._lost = lost
        self._beat = Beat(0, 0, "its start", max(timeout, _SECONDS_TO_START))
        self._count = 0
        self._answered = time.monotonic()
        self._stop = threading.Event()
        self._first = threading.Lock()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._pulse, self._guard)
        ]

    def __enter__(self) -> Self:
        self._exchange()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self.interval)

    def starting(self) -> None:
        """This process goes on with its start."""
        allowed = max(self.timeout, _SECONDS_TO_START)
        self._beat = Beat(0, self._beat.turn + 1, "its start", allowed)

    def doing(self, what: str) -> None:
        """This process begins something that takes no longer than the timeout."""
        self._beat = Beat(0, self._beat.turn + 1, what, self.timeout)

    def waiting(self, what: str) -> None:
        """This process begins to wait for others."""
        self._beat = Beat(0, self._beat.turn + 1, what, None)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """What this process does is, for this block, to wait for others."""
        what = self._beat.doing
        self.waiting(what)
        yield
        self.doing(what)

    def suspect(self) -> Loss | None:
        """Who is lost, when it is certain that somebody is; waits for a few missing beats.

        None when a verdict is there already, or nobody is found.
        """
        deadline = time.monotonic() + 2 * self._watch.grace + 3 * self.interval
        while time.monotonic() < deadline and not self.verdict:
            if loss := self._watch.suspect():
                return loss
            time.sleep(self.interval / 4)
        return None

    # ---- threads ----------------------------------------------------------------------------

    def _pulse(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._exchange()
            except Exception as error:  # of a type that differs between versions of torch
                sentence = f"{self._store_name} is gone ({type(error).__name__})"
                return self._end(Loss(None, sentence))
            if self.verdict:
                return self._end(None)
            if loss := self._watch.lost():
                return self._end(loss)

    def _exchange(self) -> None:
        self._count += 1
        # The main thread replaces the beat as a whole, so this is one of its states.
        self._store.set(self._my_key, replace(self._beat, count=self._count).encode())
        checkpoint, verdict, *beats = self._store.multi_get(self._keys)
        self.checkpoint, self.verdict = checkpoint.decode(), verdict.decode()
        self._answered = time.monotonic()
        self._watch.see([Beat.decode(beat) for beat in beats], self._answered)

    def _guard(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if now - looked > self.timeout / 2:
                self._answered = now  # this process was stopped itself, perhaps by Ctrl-Z
            looked = now
            if now - self._answered > self.timeout:
                sentence = f"{self._store_name} has given no sign of life for {self.timeout:g} s"
                return self._end(Loss(None, sentence))

    def _end(self, loss: Loss | None) -> None:
        if not self._stop.is_set() and self._first.acquire(blocking=False):
            self._lost(loss)
