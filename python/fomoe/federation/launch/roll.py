# SPDX-License-Identifier: Apache-2.0
"""The roll call of the ranks of torchrun, before anything else: who is here in this attempt.

The store outlives the ranks: after a restart it still holds what those of the last attempt wrote.
So every rank signs with a number of its own, rank 0 reads out the list of signatures it finds, and
the list counts when all have answered that their own is on it. One with an old signature gets no
answer, and is replaced when the rank that has taken that place signs.
"""

import json
import secrets
import time
from typing import Any

from fomoe.errors import SiteFailed
from fomoe.federation.launch.store import Store

__all__ = ["call_the_roll"]

_SECONDS_BETWEEN_LOOKS = 0.05


def call_the_roll(
    store: Store, rank: int, ranks: int, mine: Any, seconds: float
) -> tuple[str, list[Any]]:
    """Wait for all ranks, for at most ``seconds``.

    Returns
    -------
    tuple
        A name of this attempt that no other has, and what every rank brought along (``mine``, JSON
        values), by rank.

    Raises
    ------
    SiteFailed
        Ranks are missing.
    """
    signature = secrets.token_hex(8)
    store.set(f"signature/{rank}", json.dumps([signature, mine]))
    deadline = time.monotonic() + seconds
    attempt = ""
    lines: list[str] = []
    while True:
        if rank == 0 and (new := _signatures(store, ranks)) != lines and all(new):
            attempt, lines = secrets.token_hex(8), new
            store.set("roll", json.dumps([attempt, lines]))
        elif rank > 0 and store.check(["roll"]):
            attempt, lines = json.loads(store.get("roll"))
        if len(lines) == ranks and json.loads(lines[rank])[0] == signature:
            store.set(f"{attempt}/answer/{rank}", "")
            if store.check([f"{attempt}/answer/{r}" for r in range(ranks)]):
                return attempt, [json.loads(line)[1] for line in lines]
        if time.monotonic() > deadline:
            raise SiteFailed(_who_is_missing(store, attempt, ranks, seconds))
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _signatures(store: Store, ranks: int) -> list[str]:
    """What stands on the ranks' places, "" where nobody has signed yet."""
    keys = [f"signature/{rank}" for rank in range(ranks)]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]


def _who_is_missing(store: Store, attempt: str, ranks: int, seconds: float) -> str:
    missing = [str(rank) for rank in range(ranks) if not store.check([f"{attempt}/answer/{rank}"])]
    return (
        f"rank {', '.join(missing)} of torchrun's {ranks} ranks did not join within {seconds:g} s"
    )
