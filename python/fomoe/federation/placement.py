# SPDX-License-Identifier: Apache-2.0
"""Which site holds which experts (FoMoE section "partial expert replication").

The paper asks that every expert sits on exactly O_e sites and every site holds the same number of
experts of a layer, and leaves the generators open: both here are our choice. Imports no torch.
"""

import random as python_random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fomoe.errors import UserError
from fomoe.federation.config import Config

__all__ = ["Placement", "everywhere", "fixed", "placement_of_round", "random"]

Holders = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """``table[layer][expert]`` are the sites, ascending, that hold the expert."""

    sites: int
    table: tuple[tuple[Holders, ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.table)

    def holders(self, layer: int, expert: int) -> Holders:
        """Sites that hold the expert, ascending."""
        return self.table[layer][expert]

    def owner(self, layer: int, expert: int) -> int:
        """The holder that sums the expert's contributions and takes its outer step.

        Over all experts of all layers in order, each goes to the holder that owns fewest so far.
        """
        return self._owners[layer][expert]

    def residents(self, site: int) -> list[tuple[int, ...]]:
        """Per layer, the experts on this site, ascending."""
        return [
            tuple(expert for expert, holders in enumerate(layer) if site in holders)
            for layer in self.table
        ]

    @cached_property
    def _owners(self) -> list[list[int]]:
        owned = [0] * self.sites
        owners: list[list[int]] = []
        for layer in self.table:
            owners.append([])
            for holders in layer:
                owner = min(holders, key=owned.__getitem__)
                owned[owner] += 1
                owners[-1].append(owner)
        return owners


def everywhere(num_layers: int, num_experts: int, sites: int) -> Placement:
    """Every site holds every expert."""
    return Placement(sites, ((tuple(range(sites)),) * num_experts,) * num_layers)


def fixed(num_layers: int, num_experts: int, sites: int, overlap: int) -> Placement:
    """Sites ``(expert * overlap + layer + j) % sites``, j < overlap, hold an expert.

    Cyclic, and shifted by one site per layer, so that over the layers every site shares experts
    with more than one group of neighbours.

    Raises
    ------
    UserError
        When overlap is not in 1..sites, or ``num_experts * overlap`` not divisible by ``sites``.
    """
    _check_even(num_experts, sites, overlap)
    return Placement(
        sites,
        tuple(
            tuple(
                tuple(sorted((expert * overlap + layer + j) % sites for j in range(overlap)))
                for expert in range(num_experts)
            )
            for layer in range(num_layers)
        ),
    )


def random(
    num_layers: int, num_experts: int, sites: int, overlap: int, seed: int, draw: int
) -> Placement:
    """A random placement, the same everywhere for one seed and draw.

    Layer by layer, experts in random order go to the ``overlap`` sites that hold fewest so far, at
    random among equals. So every expert is on each site with the same probability, and the sites'
    numbers of experts never differ by more than one on the way.

    Raises
    ------
    UserError
        As :func:`fixed`.
    """
    _check_even(num_experts, sites, overlap)
    table = []
    for layer in range(num_layers):
        generator = python_random.Random(f"{seed}:placement:{draw}:{layer}")
        load = [0] * sites
        holders: list[Holders] = [()] * num_experts
        for expert in _shuffled(num_experts, generator):
            order = sorted(_shuffled(sites, generator), key=load.__getitem__)
            holders[expert] = tuple(sorted(order[:overlap]))
            for site in holders[expert]:
                load[site] += 1
        table.append(tuple(holders))
    return Placement(sites, tuple(table))


def placement_of_round(
    config: Config, num_layers: int, num_experts: int, round_index: int
) -> Placement:
    """Where the experts are during a 0-based round of a run with these settings.

    Raises
    ------
    UserError
        When the experts cannot be spread evenly over the sites.
    """
    federation = config.federation
    sites, overlap = federation.sites, federation.overlap
    _check_even(num_experts, sites, overlap)
    if overlap == sites or round_index < federation.full_replica_rounds:
        return everywhere(num_layers, num_experts, sites)
    if federation.placement == "fixed":
        return fixed(num_layers, num_experts, sites, overlap)
    draw = (round_index - federation.full_replica_rounds) // federation.shuffle_every
    return random(num_layers, num_experts, sites, overlap, config.training.seed, draw)


def _shuffled(count: int, generator: python_random.Random) -> Sequence[int]:
    # Of Python's generators, only random() itself is promised to stay the same.
    return sorted(range(count), key=lambda _: generator.random())


def _check_even(num_experts: int, sites: int, overlap: int) -> None:
    if not 1 <= overlap <= sites:
        raise UserError(
            f"federation.overlap must be between 1 and federation.sites ({sites}), got {overlap}"
        )
    if num_experts * overlap % sites:
        raise UserError(
            f"{num_experts} experts with federation.overlap = {overlap} cannot be "
            f"spread evenly over federation.sites = {sites}: "
            f"num_experts * overlap must be divisible by sites"
        )
