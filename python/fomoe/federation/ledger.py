# SPDX-License-Identifier: Apache-2.0
"""The ledger: who sent how many bytes of what in which round, and what they agreed on.

Bytes are counted where a buffer is handed to a collective, never from a formula;
:func:`expected_round_bytes` is the formula they are checked against.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from fomoe.federation.placement import Placement

__all__ = ["EXCHANGE_CLASSES", "LedgerFile", "SiteLedger", "expected_round_bytes"]

EXCHANGE_CLASSES = ("shared", "expert", "tokens")
"""What sites send each other. Beside them: ``metrics`` to the coordinator, and ``evaluation``, the
snapshot an evaluation reads."""


class SiteLedger:
    """Counts what one site sends in the current round, by traffic class."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}

    def sent(self, traffic_class: str, num_bytes: int) -> None:
        """Count bytes that leave this site."""
        self._bytes[traffic_class] = self._bytes.get(traffic_class, 0) + num_bytes

    def close_round(self) -> dict[str, int]:
        """The counts since the last call, by class; counting starts again at zero."""
        counts, self._bytes = self._bytes, {}
        return counts


class LedgerFile:
    """Appends one JSON line per round, site and traffic class."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = path.open(mode, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def record(
        self,
        round_index: int,
        site: int,
        counts: Mapping[str, int],
        tokens: int,
        contributors: Iterable[int],
        digests: Mapping[str, str],
    ) -> None:
        """``digests`` maps a class to the SHA-256 of what the site holds after the commit."""
        for traffic_class, num_bytes in sorted(counts.items()):
            line: dict[str, Any] = {
                "round": round_index,
                "site": site,
                "class": traffic_class,
                "bytes": num_bytes,
                "tokens": tokens,
                "contributors": list(contributors),
            }
            if traffic_class in digests:
                line["sha256"] = digests[traffic_class]
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def expected_round_bytes(
    shared_bytes: int, expert_bytes: int, placement: Placement
) -> dict[str, int]:
    """Bytes of one exchange, summed over all sites.

    ``2 (M - 1) b`` for the shared tensors of ``shared_bytes``, ``2 (holders - 1) b`` for every
    expert of ``expert_bytes``, and the token counts (8 bytes to every other site).
    """
    sites = placement.sites
    num_experts = placement.num_layers * placement.num_experts
    return {
        "shared": 2 * (sites - 1) * shared_bytes,
        "expert": 2 * (placement.overlap - 1) * expert_bytes * num_experts,
        "tokens": 8 * sites * (sites - 1),
    }
