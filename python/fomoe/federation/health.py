# SPDX-License-Identifier: Apache-2.0
"""Routing health: the numbers of a round's line in metrics.jsonl, and what is wrong with them.

Definitions, thresholds and the runs they come from: docs/routing_health.md. The FoMoE paper (arXiv
2606.19025) advises a few full-replica rounds to detect imbalance and gives no measure; detectors
and thresholds are our choice. Imports no torch.

A *layer* here is a list with one entry per site: the fields of
:class:`fomoe.nn.RouterStatistics` as a dict.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

__all__ = ["MEASURES", "Finding", "Reading", "RoutingHealth", "summarize_routing"]

PERSISTENCE = 3  # rounds in a row
FEWEST_CHOICES = 64  # per candidate: fewer, and chance alone makes a load uneven
LOWEST_ENTROPY = 0.8
LARGEST_SKEW = 0.1  # of the ghost share, mean over sites
LARGEST_SITE_SKEW = 0.15  # of a site's ghost share
LARGEST_GROWTH = 1.15  # of the load variation over its baseline
HARMLESS_VARIATION = 0.5  # whatever it was before

MEASURES = {
    "uneven_load": "load_entropy",
    "dead_experts": "dead_experts",
    "skipping": "ghost_share",
    "unequal_sites": "ghost_share",
    "growing_variation": "load_variation",
}
"""Kinds of findings, and the number that each is about."""

_PER_SITE = ("load_entropy", "load_variation", "dead_experts", "ghost_share")

Layer = Sequence[dict[str, Any]]


class Finding(BaseModel):
    """Something is wrong with the routing of a layer since ``PERSISTENCE`` rounds.

    ``site`` is the worst one, None where it is about all of them; ``round`` the 0-based round that
    completed the observation. ``value`` is of the measure ``MEASURES[kind]`` and ``expected`` what
    an even router, or for a variation that grew the baseline, has.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    kind: str
    layer: int
    site: int | None
    round: int
    value: float
    expected: float
    sentence: str

    def line(self) -> dict[str, Any]:
        """Its line of kind ``warning`` in metrics.jsonl, which calls the finding's kind so."""
        values = self.model_dump()
        return {"finding": values.pop("kind"), **values}


class Reading(NamedTuple):
    """What a detector sees in one round of one layer."""

    value: float
    expected: float
    site: int | None
    is_bad: bool


# ---- detectors ------------------------------------------------------------------------------


def uneven_load(layer: Layer) -> Reading:
    """Lowest load entropy of a site."""
    entropies = _values(layer, "load_entropy")
    site = entropies.index(min(entropies))
    return Reading(entropies[site], 1, site, entropies[site] < LOWEST_ENTROPY)


def dead_experts(layer: Layer) -> Reading:
    """Experts that no site chose; else the most that one site could have chosen and did not."""
    everywhere = _dead_everywhere(layer)
    if everywhere:
        return Reading(everywhere, 0, None, True)
    dead = _values(layer, "dead_experts")
    site = dead.index(max(dead))
    return Reading(dead[site], 0, site, dead[site] > 0)


def skipping(layer: Layer) -> Reading:
    """Ghost share, mean over sites, against the one of even routing.

    If all sites routed alike, this mean would be even whatever the load: every expert is a ghost
    on as many sites. So a skew says that routers follow what their own site holds.
    """
    value, even = _mean(_values(layer, "ghost_share")), _mean(_even_ghost_shares(layer))
    return Reading(value, even, None, abs(value - even) > LARGEST_SKEW)


def unequal_sites(layer: Layer) -> Reading:
    """Ghost share of the site that is furthest from what the layer's mean lets one expect of it.

    Such a site holds experts that all sites choose often, or seldom, and executes more or less
    than the others.
    """
    shares, even = _values(layer, "ghost_share"), _even_ghost_shares(layer)
    skew = _mean(shares) - _mean(even)
    distances = [abs(a - b - skew) for a, b in zip(shares, even, strict=True)]
    site = distances.index(max(distances))
    return Reading(shares[site], even[site] + skew, site, distances[site] > LARGEST_SITE_SKEW)


def growing_variation(layer: Layer, baseline: float) -> Reading:
    """Load variation, mean over sites, against a ``baseline`` of earlier rounds."""
    value = _mean(_values(layer, "load_variation"))
    is_bad = value > max(LARGEST_GROWTH * baseline, HARMLESS_VARIATION)
    return Reading(value, baseline, None, is_bad)


# ---- over the rounds ------------------------------------------------------------------------


class Baseline(BaseModel):
    """Load variation of a layer before it can have grown: a mean over ``rounds`` rounds."""

    model_config = ConfigDict(strict=True)

    variation: float = 0.0
    rounds: int = 0


class RoutingHealth(BaseModel):
    """Watches a run, one round at a time; a value that travels with the checkpoint.

    A finding is made when a detector has seen the same fault in the same layer for ``PERSISTENCE``
    rounds in a row, and once per kind and layer. A round in which a site made fewer than
    ``FEWEST_CHOICES`` choices per candidate is left out.

    The baseline of a layer's load variation is the last round in which every site held every
    expert; in a run that does not begin with such rounds, the mean of its first ``PERSISTENCE``.
    """

    model_config = ConfigDict(strict=True)

    full_replica_rounds: int = 0
    streaks: dict[str, int] = {}
    baselines: list[Baseline] = []
    findings: list[Finding] = []

    def observe(self, round_index: int, by_site: Sequence[Layer]) -> list[Finding]:
        """Take in a round's statistics, ``by_site[site][layer]``; return what is newly found."""
        layers = list(zip(*by_site, strict=True))
        if not all(_says_something(layer) for layer in layers):
            return []
        is_full = all(_holds_everything(layer) for layer in layers)
        self.full_replica_rounds += is_full and bool(layers)
        self.baselines = self.baselines or [Baseline() for _ in layers]
        new: list[Finding] = []
        for index, layer in enumerate(layers):
            readings = {kind: detect(layer) for kind, detect in _DETECTORS.items()}
            readings |= self._growth(self.baselines[index], layer, is_full)
            for kind, reading in readings.items():
                if self._persists(f"{kind}/{index}", reading):
                    new.append(self._finding(kind, index, round_index, layer, reading))
        self.findings += new
        return new

    def is_first_of_its_kind(self, finding: Finding) -> bool:
        """Whether the same was not found in another layer before."""
        return next(each for each in self.findings if each.kind == finding.kind) is finding

    def _growth(self, baseline: Baseline, layer: Layer, is_full: bool) -> dict[str, Reading]:
        variation = _mean(_values(layer, "load_variation"))
        if is_full:
            baseline.variation, baseline.rounds = variation, PERSISTENCE
        elif baseline.rounds < PERSISTENCE:
            baseline.rounds += 1
            baseline.variation += (variation - baseline.variation) / baseline.rounds
        else:
            return {"growing_variation": growing_variation(layer, baseline.variation)}
        return {}

    def _persists(self, name: str, reading: Reading) -> bool:
        """Whether this makes it a finding: true once."""
        streak = self.streaks.get(name, 0)
        if streak < PERSISTENCE:  # then it stays: found is found
            self.streaks[name] = streak + 1 if reading.is_bad else 0
        return streak < PERSISTENCE == self.streaks[name]

    def _finding(
        self, kind: str, index: int, round_index: int, layer: Layer, reading: Reading
    ) -> Finding:
        return Finding(
            kind=kind,
            layer=index,
            site=reading.site,
            round=round_index,
            value=reading.value,
            expected=reading.expected,
            sentence=self._sentence(kind, index, layer, reading),
        )

    def _sentence(self, kind: str, index: int, layer: Layer, reading: Reading) -> str:
        value, expected, site, _ = reading
        replicas = (
            "begin with more rounds of full replicas: federation.full_replica_rounds, "
            f"here {self.full_replica_rounds}"
        )
        balance = "raise model.balance_loss_coefficient"
        candidates = len(layer[0]["load"]) if site is None else layer[site]["num_candidates"]
        towards = "towards" if value < expected else "away from"
        return {
            "uneven_load": f"the routing of layer {index} has collapsed: load entropy "
            f"{value:.2f} at site {site}, where 1 is even; {balance}",
            "dead_experts": f"layer {index} has dead experts: "
            f"{'no site' if site is None else f'site {site} never'} chose {value:.0f} of "
            f"{candidates}; {balance}",
            "skipping": f"skipping unbalances the routing of layer {index}, {towards} the experts "
            f"each site holds: ghost share {value:.2f}, where {expected:.2f} is even; {replicas}",
            "unequal_sites": f"skipping is unequal in layer {index}: ghost share {value:.2f} at "
            f"site {site}, where {expected:.2f} would be equal; {replicas}, or {balance}",
            "growing_variation": f"skipping unbalances the routing of layer {index}: load "
            f"variation {value:.2f}, before it was {expected:.2f}; {replicas}",
        }[kind]


_DETECTORS: dict[str, Callable[[Layer], Reading]] = {
    "uneven_load": uneven_load,
    "dead_experts": dead_experts,
    "skipping": skipping,
    "unequal_sites": unequal_sites,
}


def summarize_routing(by_site: Sequence[Layer]) -> list[dict[str, Any]]:
    """A round's routing for its line in metrics.jsonl, from ``by_site[site][layer]``.

    Per layer: the mean over the sites that routed anything, the experts that no site chose, and
    under ``sites`` the same numbers of every site, to four digits.
    """
    return [
        {
            "layer": index,
            "load": [_mean(loads) for loads in zip(*(site["load"] for site in layer), strict=True)],
            "load_entropy": _mean(_values(layer, "load_entropy")),
            "load_variation": _mean(_values(layer, "load_variation")),
            "dead_experts": _dead_everywhere(layer),
            "ghost_share": _mean(_values(layer, "ghost_share")),
            "even_ghost_share": _mean(_even_ghost_shares(layer)),
            "sites": {
                name: [round(value, 4) for value in _values(layer, name)] for name in _PER_SITE
            },
        }
        for index, layer in enumerate(zip(*by_site, strict=True))
    ]


def _dead_everywhere(layer: Layer) -> int:
    by_expert = zip(*(site["load"] for site in layer), strict=True)
    return sum(not any(load > 0 for load in loads) for loads in by_expert)


def _even_ghost_shares(layer: Layer) -> list[float]:
    """By site, the share of the candidates that are not resident; none for a partitioned router."""
    return [1 - site["num_residents"] / site["num_candidates"] for site in layer]


def _holds_everything(layer: Layer) -> bool:
    return all(site["num_residents"] == len(site["load"]) for site in layer)


def _says_something(layer: Layer) -> bool:
    return all(site["num_choices"] >= FEWEST_CHOICES * site["num_candidates"] for site in layer)


def _values(layer: Layer, name: str) -> list[Any]:
    return [site[name] for site in layer]


def _mean(values: Sequence[float]) -> float:
    """Over what is a number: a site that routed nothing has none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
