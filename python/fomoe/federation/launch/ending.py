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
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from fomoe.federation.launch.heartbeat import VERDICT
from fomoe.federation.launch.store import Store

__all__ = ["Ending", "on_termination"]

_SECONDS_TO_AGREE = 3.0


class Ending:
    """Ends this process, from any thread and whatever the others are blocked in.

    Parameters
    ----------
    store
        A connection of its own.
    machine
        The number of this machine.
    """

    def __init__(self, store: Store, machine: int) -> None:
        self._store = store
        self._said = f"said/{machine}"
        self._once = threading.Lock()

    def end(self, sentence: str, code: int) -> NoReturn:
        """Leave with one sentence, the one that all agree on; ``sentence`` if it is the first."""
        self._once.acquire()  # a second caller waits here until the process is gone
        agreed, speaks = (sentence, code), True

        def agree() -> None:
            nonlocal agreed, speaks
            verdict = self._store.compare_set(VERDICT, "", json.dumps(agreed))
            agreed = tuple(json.loads(verdict))
            speaks = self._store.add(self._said, 1) == 1

        # Whoever hosts the store may be the one that is lost, and then never answers.
        thread = threading.Thread(target=_quietly, args=(agree,), daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_AGREE)
        if speaks:
            print(f"error: {agreed[0]}", file=sys.stderr)
        leave(agreed[1])

    def has_verdict(self) -> bool:
        """Whether somebody has said why the run ends; False when the store does not answer."""
        found = False

        def look() -> None:
            nonlocal found
            found = bool(self._store.get(VERDICT))

        thread = threading.Thread(target=_quietly, args=(look,), daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_AGREE)
        return found


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
