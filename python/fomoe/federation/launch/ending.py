# SPDX-License-Identifier: Apache-2.0
"""How a rank of torchrun ends when the run cannot go on: all agree on one sentence.

The first to find out leaves it in the store, where the heartbeats of all others find it. On every
machine one rank says it.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import NoReturn

from fomoe.federation.launch.heartbeat import VERDICT
from fomoe.federation.launch.store import Store

__all__ = ["Ending", "Verdict", "leave", "on_termination"]

_SECONDS_TO_AGREE = 3.0


@dataclass(frozen=True)
class Verdict:
    """Why a run ends: one sentence, the exit code, and the rank that is lost, if one is."""

    sentence: str
    code: int
    member: int | None = None


class Ending:
    """Ends this process, from any thread and whatever the others are blocked in.

    Parameters
    ----------
    store
        A connection of its own.
    machine
        The number of this machine.
    neighbours
        Process ids of the other ranks on this machine, by rank.
    """

    def __init__(self, store: Store, machine: int, neighbours: Mapping[int, int]) -> None:
        self._store = store
        self._said = f"said/{machine}"
        self._neighbours = neighbours
        self._once = threading.Lock()

    def end(self, mine: Verdict) -> NoReturn:
        """Leave with the verdict that all agree on: ``mine``, if it is the first."""
        self._once.acquire()  # a second caller waits here until the process is gone
        verdict, speaks = mine, True

        def agree() -> None:
            nonlocal verdict, speaks
            agreed = self._store.compare_set(VERDICT, "", json.dumps(asdict(mine)))
            verdict = Verdict(**json.loads(agreed))
            speaks = self._store.add(self._said, 1) == 1

        # Whoever hosts the store may be the one that is lost, and then never answers.
        thread = threading.Thread(target=_quietly, args=(agree,), daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_AGREE)
        if verdict.member is not None and verdict.member in self._neighbours:
            # If it is stopped, torchrun would wait for it for half a minute.
            with suppress(ProcessLookupError):
                os.kill(self._neighbours[verdict.member], signal.SIGKILL)
        if speaks:
            print(f"error: {verdict.sentence}", file=sys.stderr)
        leave(verdict.code)

    def dead_neighbour(self) -> int | None:
        """The rank of a process on this machine that is gone; torchrun has waited for it."""
        for member, process in self._neighbours.items():
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return member
        return None


def leave(code: int) -> NoReturn:
    """End the process now: other threads may be blocked for ever in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _quietly(action: Callable[[], None]) -> None:
    """The store's errors differ between versions of torch, and here none of them matters."""
    try:
        action()
    except Exception:
        return


def on_termination(act: Callable[[int], None]) -> None:
    """Call ``act`` with the number of SIGTERM or SIGINT when it comes, in a thread of its own.

    Python's handlers wait for the main thread, which may be blocked in a collective; the file
    descriptor that signals are written to does not.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def ignore(number: int, frame: FrameType | None) -> None:
        """The thread below deals with it."""

    def watch() -> None:
        while True:
            act(os.read(reading, 1)[0])

    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignore)
    threading.Thread(target=watch, daemon=True).start()
