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
    "expected_round_bytes",
    "round_lines",
]

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


def contributors(traffic_class: str, site: int, placement: Placement) -> list[int]:
    """The sites, ascending, that have a part in what ``site`` sends of a class.

    Experts: the sites that hold an expert of ``site``. Shared tensors and token counts: all. What
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
