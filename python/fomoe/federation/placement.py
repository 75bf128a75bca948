# SPDX-License-Identifier: Apache-2.0
"""Which site holds which experts (FoMoE section "partial expert replication", fixed mode).

The paper asks that every expert sits on exactly O_e sites and every site holds the same number of
experts, and leaves the generator open. Ours is cyclic and shifted by one site per layer, so that
over the layers every site shares experts with more than one group of neighbours.
"""

from dataclasses import dataclass
from functools import cache

from fomoe.errors import UserError

__all__ = ["Placement"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Sites ``(e * overlap + l + j) mod sites``, j < overlap, hold expert ``e`` of layer ``l``.

    Raises
    ------
    UserError
        When overlap is not in 1..sites, or the experts cannot be spread evenly
        (``num_experts * overlap`` must be divisible by ``sites``).
    """

    num_layers: int
    num_experts: int
    sites: int
    overlap: int

    def __post_init__(self) -> None:
        if not 1 <= self.overlap <= self.sites:
            raise UserError(
                f"federation.overlap must be between 1 and federation.sites ({self.sites}), "
                f"got {self.overlap}"
            )
        if self.num_experts * self.overlap % self.sites:
            raise UserError(
                f"{self.num_experts} experts with federation.overlap = {self.overlap} cannot be "
                f"spread evenly over federation.sites = {self.sites}: "
                f"num_experts * overlap must be divisible by sites"
            )

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Sites that hold the expert, ascending."""
        first = expert * self.overlap + layer
        return tuple(sorted((first + j) % self.sites for j in range(self.overlap)))

    def owner(self, layer: int, expert: int) -> int:
        """The holder that sums the expert's contributions and takes its outer step.

        Over all experts of all layers in order, each goes to the holder that owns fewest so far.
        """
        return _owners(self)[layer][expert]

    def residents(self, site: int) -> list[tuple[int, ...]]:
        """Per layer, the experts on this site, ascending."""
        return [
            tuple(e for e in range(self.num_experts) if site in self.holders(layer, e))
            for layer in range(self.num_layers)
        ]


@cache
def _owners(placement: Placement) -> list[list[int]]:
    owned = [0] * placement.sites
    owners: list[list[int]] = []
    for layer in range(placement.num_layers):
        owners.append([])
        for expert in range(placement.num_experts):
            owner = min(placement.holders(layer, expert), key=lambda site: owned[site])
            owned[owner] += 1
            owners[layer].append(owner)
    return owners
