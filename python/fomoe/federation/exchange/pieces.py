# SPDX-License-Identifier: Apache-2.0
"""Who owns what, who contributes to it and who receives it: the plan of every meeting.

Every tensor has an owner. The shared tensors, laid end to end in blocks, are cut into one shard per
site, about equally large; an expert, and its row of the router, is owned by one of its holders.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fomoe.federation.placement import Placement
from fomoe.nn import ModelTensor

__all__ = ["BLOCK", "Piece", "cut"]

BLOCK = 128
"""Elements that a lossy codec scales together; no piece begins inside of a block. Our choice."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of a tensor, flattened, that site ``owner`` sums.

    ``contributors`` send theirs to the owner, ``receivers`` get the result; both ascending.
    ``factor`` multiplies the mean of pseudo-gradients. ``traffic_class`` is the ledger's: shared,
    expert, or router for the rows of a router that every site has.
    """

    tensor: str
    start: int
    stop: int
    owner: int
    contributors: tuple[int, ...]
    receivers: tuple[int, ...]
    traffic_class: str
    factor: float = 1.0

    @property
    def num_elements(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Unique over the federation: ``norm.weight[0:64]``."""
        return self.key_of(self.tensor, self.start, self.stop)

    @staticmethod
    def key_of(tensor: str, start: int, stop: int) -> str:
        return f"{tensor}[{start}:{stop}]"


def cut(
    tensors: Sequence[ModelTensor],
    placement: Placement,
    *,
    router_mean: str = "all",
    scale_expert_steps: bool = False,
) -> list[Piece]:
    """The pieces of a site's tensors, in an order that all sites share for what they share.

    Tensors that are not trained have none: a mean of equal values may differ from them.

    ``router_mean`` and ``scale_expert_steps`` are the settings of that name: FoMoE leaves open how
    the rows of a full router are averaged, of which sites that do not hold the expert see no
    gradient from the loss.
    """
    everyone = tuple(range(placement.sites))
    tensors = [tensor for tensor in tensors if tensor.is_trained]
    pieces = list(_shards([t for t in tensors if t.expert is None], everyone))
    for tensor in tensors:
        if tensor.expert is None or tensor.layer is None:
            continue
        holders = placement.holders(tensor.layer, tensor.expert)
        share = len(holders) / placement.sites
        if tensor.on_every_site:
            contributors = holders if router_mean == "holders" else everyone
            factor = 1 / share if router_mean == "rescaled" else 1.0
            traffic_class, receivers = "router", everyone
        else:
            contributors = receivers = holders
            factor = share**0.5 if scale_expert_steps else 1.0
            traffic_class = "expert"
        pieces.append(
            Piece(
                tensor.name,
                0,
                tensor.num_elements,
                placement.owner(tensor.layer, tensor.expert),
                contributors,
                receivers,
                traffic_class,
                factor,
            )
        )
    return pieces


def _shards(tensors: Sequence[ModelTensor], everyone: tuple[int, ...]) -> Iterator[Piece]:
    """The shared tensors, cut between blocks where a site's share ends."""
    sites = len(everyone)
    blocks = [-(-tensor.num_elements // BLOCK) for tensor in tensors]
    total, first = sum(blocks), 0
    bounds = [total * site // sites for site in range(sites + 1)]
    for tensor, count in zip(tensors, blocks, strict=True):
        for site in everyone:
            begin = max(bounds[site] - first, 0)
            end = min(bounds[site + 1] - first, count)
            stop = min(end * BLOCK, tensor.num_elements)
            if begin * BLOCK < stop:
                yield Piece(tensor.name, begin * BLOCK, stop, site, everyone, everyone, "shared")
        first += count
