# SPDX-License-Identifier: Apache-2.0
"""The meeting of the sites at the end of a round: to the owners, mean, outer step, and back.

Every tensor has one owner. The shared tensors, laid end to end, are cut into one shard per site;
an expert is owned by one of its holders. Contributions travel to the owners in an uneven
all-to-all, are summed there in ascending site id, and the results come back the same way. A ring
all-reduce could not do this: its order of summation depends on the position in the ring.

Summed over the sites, one exchange sends ``2 (M - 1) b`` bytes for shared tensors of b bytes and
``2 (holders - 1) b`` for an expert's. No site ever receives a tensor of an expert it does not hold.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.federation.ledger import SiteLedger
from fomoe.federation.memory import tensor_bytes
from fomoe.federation.parameters import FederatedTensor
from fomoe.federation.placement import Placement

__all__ = ["SHARED_PIECE", "Exchange", "shard_bounds", "weighted_mean"]

SHARED_PIECE = "shared"
"""Name of the owner's shard of the shared tensors, beside the names of the experts it owns."""


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w_i x_i) / sum(w_i)`` in the given order; a single value is copied.

    Products and sums are separate roundings and there is one division, so that the result is the
    same on every machine. Source: FoMoE Algorithm 1 (mean over holders); weighting by tokens and
    the order are our choice.
    """
    if len(values) == 1:
        return values[0].clone()
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total / sum(weights)


def shard_bounds(num_elements: int, sites: int) -> list[int]:
    """Where each site's shard of ``num_elements`` begins, and the end: ``sites + 1`` numbers."""
    return [num_elements * site // sites for site in range(sites + 1)]


class Exchange:
    """One site's side of the exchange, for the tensors of its model.

    All buffers are scratch: a failed exchange leaves the model and the caller's tensors untouched.

    Raises
    ------
    ValueError
        When the tensors differ in dtype.
    """

    def __init__(
        self,
        tensors: Sequence[FederatedTensor],
        placement: Placement,
        site: int,
        ledger: SiteLedger,
    ) -> None:
        dtypes = {tensor.parameter.dtype for tensor in tensors}
        if len(dtypes) != 1:
            raise ValueError(f"all parameters must have one dtype, got {sorted(map(str, dtypes))}")
        self.dtype = dtypes.pop()
        self.tensors = tensors
        self.site = site
        self.sites = placement.sites
        self.ledger = ledger
        self.peak_scratch_bytes = 0
        self.seconds = 0.0
        """In collectives since the start, waiting for slower sites included."""

        self.shared = [tensor for tensor in tensors if tensor.is_shared]
        self.bounds = shard_bounds(sum(t.num_elements for t in self.shared), self.sites)
        experts = [
            (tensor, placement.owner(tensor.layer, tensor.expert))
            for tensor in tensors
            if tensor.layer is not None and tensor.expert is not None
        ]
        self.held_by_owner = [[t for t, owner in experts if owner == s] for s in range(self.sites)]
        self.owned = self.held_by_owner[site]
        self.owned_by_holder = [
            [t for t in self.owned if s in placement.holders(t.layer or 0, t.expert or 0)]
            for s in range(self.sites)
        ]

    def reduce(self, contributions: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Send contributions to their owners; return the means of the pieces this site owns.

        ``contributions`` maps every tensor name of this site to a tensor of its shape; ``tokens``
        is the weight of this site. The result maps ``SHARED_PIECE`` to a flat shard and the name of
        every owned expert tensor to its mean.
        """
        weights = self._gather_tokens(tokens)
        held = list(contributions.values())
        shard = self._reduce_shared(contributions, weights, held)
        experts = self._reduce_experts(contributions, weights, [*held, shard])
        return {SHARED_PIECE: shard, **experts}

    def distribute(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send the owned pieces to all who hold them; return one tensor per name of this site."""
        held = list(pieces.values())
        shards = pieces[SHARED_PIECE].repeat(self.sites)
        shared = self._all_to_all(
            shards, self._own_shards(), self._shard_sizes(), "shared", keep=held
        )
        del shards
        outbox = self._flat([pieces[t.name] for owned in self.owned_by_holder for t in owned])
        experts = self._all_to_all(
            outbox,
            self._sizes(self.owned_by_holder),
            self._sizes(self.held_by_owner),
            "expert",
            keep=[*held, shared],
        )
        return self._unpack(shared, self.shared) | self._unpack(
            experts, [tensor for held in self.held_by_owner for tensor in held]
        )

    def _reduce_shared(
        self, contributions: Mapping[str, Tensor], weights: Sequence[float], held: list[Tensor]
    ) -> Tensor:
        outbox = self._flat([contributions[tensor.name] for tensor in self.shared])
        inbox = self._all_to_all(
            outbox, self._shard_sizes(), self._own_shards(), "shared", keep=held
        )
        return weighted_mean(inbox.view(self.sites, inbox.numel() // self.sites).unbind(), weights)

    def _reduce_experts(
        self, contributions: Mapping[str, Tensor], weights: Sequence[float], held: list[Tensor]
    ) -> dict[str, Tensor]:
        outbox = self._flat([contributions[t.name] for group in self.held_by_owner for t in group])
        inbox = self._all_to_all(
            outbox,
            self._sizes(self.held_by_owner),
            self._sizes(self.owned_by_holder),
            "expert",
            keep=held,
        )
        received: dict[str, list[tuple[float, Tensor]]] = {}
        offset = 0
        for holder, owned in enumerate(self.owned_by_holder):
            for tensor in owned:
                value = inbox[offset : offset + tensor.num_elements]
                received.setdefault(tensor.name, []).append((weights[holder], value))
                offset += tensor.num_elements
        means = {}
        for tensor in self.owned:
            holder_weights, values = zip(*received[tensor.name], strict=True)
            means[tensor.name] = weighted_mean(values, holder_weights).view(tensor.value.shape)
        return means

    def _gather_tokens(self, tokens: int) -> list[float]:
        mine = torch.tensor([tokens], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.sites)]
        begin = time.perf_counter()
        dist.all_gather(everyone, mine)
        self.seconds += time.perf_counter() - begin
        self.ledger.sent("tokens", mine.numel() * mine.element_size() * (self.sites - 1))
        return [float(count.item()) for count in everyone]

    def _all_to_all(
        self,
        outbox: Tensor,
        send: list[int],
        receive: list[int],
        traffic_class: str,
        *,
        keep: Sequence[Tensor],
    ) -> Tensor:
        """``keep``: what else of this meeting is alive now, for the account of memory."""
        inbox = outbox.new_empty(sum(receive))
        begin = time.perf_counter()
        dist.all_to_all_single(inbox, outbox, receive, send)
        self.seconds += time.perf_counter() - begin
        crossing = outbox.numel() - send[self.site]  # what a site sends to itself crosses no link
        self.ledger.sent(traffic_class, crossing * outbox.element_size())
        self.peak_scratch_bytes = max(
            self.peak_scratch_bytes, tensor_bytes([inbox, outbox, *keep], besides=self._of_model())
        )
        return inbox

    def _of_model(self) -> Iterator[Tensor]:
        """Parameters and gradients, which contributions may be views of."""
        for tensor in self.tensors:
            yield tensor.parameter
            if tensor.parameter.grad is not None:
                yield tensor.parameter.grad

    def _flat(self, values: Sequence[Tensor]) -> Tensor:
        if not values:
            return torch.empty(0, dtype=self.dtype)
        return torch.cat([value.reshape(-1) for value in values])

    def _unpack(self, flat: Tensor, tensors: Sequence[FederatedTensor]) -> dict[str, Tensor]:
        pieces = torch.split(flat, [tensor.num_elements for tensor in tensors])
        return {t.name: piece.view(t.value.shape) for t, piece in zip(tensors, pieces, strict=True)}

    def _shard_sizes(self) -> list[int]:
        return [self.bounds[s + 1] - self.bounds[s] for s in range(self.sites)]

    def _own_shards(self) -> list[int]:
        return [self.bounds[self.site + 1] - self.bounds[self.site]] * self.sites

    @staticmethod
    def _sizes(groups: Sequence[Sequence[FederatedTensor]]) -> list[int]:
        return [sum(tensor.num_elements for tensor in group) for group in groups]
