# SPDX-License-Identifier: Apache-2.0
"""The ledger: who sent how many bytes of what in which round, and what they agreed on.

Bytes are counted where a buffer is handed to a collective, never from a formula;
:func:`expected_round_bytes` is the formula they are checked against.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fomoe.errors import SiteFailed
from fomoe.federation.placement import Placement

__all__ = [
    "EXCHANGE_CLASSES",
    "SiteLedger",
    "check_agreement",
    "contributors",
    "expected_moved_bytes",
    "expected_round_bytes",
    "round_lines",
]

EXCHANGE_CLASSES = ("shared", "router", "expert", "moved", "tokens", "activations")
"""What sites send each other: shared tensors, rows of a full router, experts, experts that change
sites, token counts, and, with expert parallelism, the rows of tokens with their gradients. Beside
them: ``metrics`` to the coordinator, ``evaluation``, what an evaluation needs, and ``checkpoint``,
files that have to cross the network."""


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


def contributors(traffic_class: str, site: int, placement: Placement) -> list[int]:
    """The sites, ascending, that have a part in what ``site`` sends of a class.

    Experts: the sites that hold an expert of ``site``. What else sites send each other: all. What
    goes to the coordinator: the site alone.
    """
    if traffic_class == "expert":
        return sorted(
            {
                holder
                for layer, experts in enumerate(placement.residents(site))
                for expert in experts
                for holder in placement.holders(layer, expert)
            }
        )
    return list(range(placement.sites)) if traffic_class in EXCHANGE_CLASSES else [site]


def round_lines(
    index: int, reports: Sequence[Mapping[str, Any]], placement: Placement
) -> list[dict[str, Any]]:
    """The ledger's lines of a round, one per site and traffic class.

    ``sha256`` is of what the site holds after the commit: for the shared tensors a digest, for
    experts one per group of holders, ``{"0,2": ...}`` (see :func:`check_agreement`).
    """
    lines = []
    for site, report in enumerate(reports):
        for traffic_class, num_bytes in sorted(report["bytes"].items()):
            line = {
                "round": index,
                "site": site,
                "class": traffic_class,
                "bytes": num_bytes,
                "tokens": report["tokens"],
                "contributors": contributors(traffic_class, site, placement),
            }
            if traffic_class in report["digests"]:
                line["sha256"] = report["digests"][traffic_class]
            lines.append(line)
    return lines


def check_agreement(index: int, digests: Sequence[Mapping[str, Any]]) -> None:
    """Compare the sites' digests after round ``index``, given by site.

    ``shared`` is a digest and must be the same everywhere. ``expert`` maps a group of holders,
    written ``"0,2"``, to the digest of all experts that exactly these sites hold.

    Raises
    ------
    SiteFailed
        Sites hold different values of what they hold in common.
    """
    if len({digest["shared"] for digest in digests}) > 1:
        raise SiteFailed(f"after round {index} the sites hold different shared tensors")
    seen: dict[str, tuple[int, str]] = {}
    for site, digest in enumerate(digests):
        for group, value in digest["expert"].items():
            first, expected = seen.setdefault(group, (site, value))
            if value != expected:
                raise SiteFailed(
                    f"after round {index} sites {first} and {site} hold different values of the "
                    f"experts of sites {group}"
                )


def expected_round_bytes(
    placement: Placement,
    *,
    shared_bytes: int,
    expert_bytes: int,
    router_bytes: int = 0,
    router_mean: str = "all",
) -> dict[str, int]:
    """Bytes of one exchange of encoded tensors, summed over all M sites.

    ``2 (M - 1) b`` for the shared tensors of ``shared_bytes``, ``2 (holders - 1) b`` for every
    expert of ``expert_bytes``, and the token counts (8 bytes to every other site). ``router_bytes``
    are of one expert's row in a full router, which goes back to all sites: ``2 (M - 1) b``, or
    ``(holders - 1 + M - 1) b`` when only holders contribute.
    """
    others = placement.sites - 1
    others_that_hold = [len(holders) - 1 for layer in placement.table for holders in layer]
    contributing = (
        others_that_hold if router_mean == "holders" else [others] * len(others_that_hold)
    )
    return {
        "shared": 2 * others * shared_bytes,
        "router": sum(n + others for n in contributing) * router_bytes,
        "expert": 2 * sum(others_that_hold) * expert_bytes,
        "tokens": 8 * placement.sites * others,
    }


def expected_moved_bytes(
    old: Placement, new: Placement, *, expert_bytes: int, momentum_bytes: int
) -> int:
    """Bytes that a change of placement sends, summed over all sites.

    Every new holder gets an expert's weights, ``expert_bytes``; a new owner its outer momenta,
    ``momentum_bytes`` (its row of the router has one, too; 0 without momentum).
    """
    total = 0
    for layer, experts in enumerate(new.table):
        for expert, holders in enumerate(experts):
            total += len(set(holders) - set(old.holders(layer, expert))) * expert_bytes
            total += (new.owner(layer, expert) != old.owner(layer, expert)) * momentum_bytes
    return total
