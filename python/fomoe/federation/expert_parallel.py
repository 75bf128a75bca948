# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism across sites: tokens travel to the one rank of every expert, at every step.

The baseline that the FoMoE paper (arXiv 2606.19025) has no number for. What all sites compute
together is one model on one batch, so its gradients are those of a single process.
"""

import math
import struct
from collections.abc import Sequence

from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.comm import Transport as TokenTransport
from fomoe.federation.exchange import Transport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.placement import Placement
from fomoe.federation.sharding import is_sharded, local
from fomoe.federation.site_ranks import SiteRanks
from fomoe.federation.task import Task, expert_parallel_model
from fomoe.nn import ModelTensor

__all__ = ["ExpertParallelism"]


class ExpertParallelism:
    """One rank's part in it; all ranks of all sites make the same calls.

    Parameters
    ----------
    tokens : TokenTransport
        How rows of tokens travel; its sites are those of the federation.
    transport : Transport
        The site's way to the others, for a few numbers a step; the leader's is used.
    ranks : SiteRanks
        This rank's way to the others of its site.
    ledger : SiteLedger
    """

    def __init__(
        self,
        tokens: TokenTransport,
        transport: Transport,
        ranks: SiteRanks,
        ledger: SiteLedger,
    ) -> None:
        self.tokens = tokens
        self.transport = transport
        self.ranks = ranks
        self.ledger = ledger
        self.exchanges: Sequence[ExpertExchange] = ()
        self._weight = 1.0
        self._counted = 0

    def build(self, task: Task, placement: Placement) -> nn.Module:
        """The model of this rank, whose layers send tokens to the others.

        Each site's experts are on its ranks, neighbours together.

        Raises
        ------
        UserError
            The task has no such model.
        """
        self.exchanges = [
            ExpertExchange(self.tokens, self._owners([holders[0] for holders in layer]))
            for layer in placement.table
        ]
        return expert_parallel_model(task, self.exchanges, "federation.strategy = 'ep'")

    def _owners(self, sites: Sequence[int]) -> list[int]:
        """The rank of every expert, from its site."""
        owners = [0] * len(sites)
        for site in range(self.transport.sites):
            ranks = self.tokens.topology.ranks_of(site)
            experts = [expert for expert, its_site in enumerate(sites) if its_site == site]
            for index, expert in enumerate(experts):
                owners[expert] = ranks[index * len(ranks) // len(experts)]
        return owners

    def objective(self, loss: Tensor, num_tokens: int) -> Tensor:
        """The site's share of the mean loss over all tokens, times the number of sites."""
        counts = [count for (count,) in self._gather(num_tokens)]
        self._weight = num_tokens * len(counts) / sum(counts)
        return loss * self._weight

    def finish_gradients(self, tensors: Sequence[ModelTensor]) -> None:
        """After the backward: gradients as if every site had all tokens that concern it.

        Those of experts are final for a site of one rank, else sums over its ranks. Those of other
        tensors are of this rank's own tokens, for a mean over the ranks of a site and one that
        weighs sites by their tokens.
        """
        divided = set()
        for tensor in tensors:
            gradient = tensor.parameter.grad
            if gradient is not None and id(tensor.parameter) not in divided:
                gradient /= self._weight if tensor.on_every_site else self.transport.sites
                divided.add(id(tensor.parameter))

    def clip(self, tensors: Sequence[ModelTensor], max_norm: float) -> None:
        """Scale the gradients so that the norm over the whole model is at most ``max_norm``."""
        gradients: dict[int, Tensor] = {}
        # What every rank of a site has, what it has a shard of, and what it alone has.
        squares = {"replicas": 0.0, "shards": 0.0, "experts": 0.0}
        for tensor in tensors:
            gradient = tensor.parameter.grad
            if gradient is not None and id(tensor.parameter) not in gradients:
                kind = "shards" if is_sharded(gradient) else "replicas"
                kind = kind if tensor.on_every_site else "experts"
                gradients[id(tensor.parameter)] = local(gradient)
                squares[kind] += local(gradient).double().square().sum().item()
        shards, experts = self.ranks.add_up([squares["shards"], squares["experts"]])
        # Python sums what all sites know in one order, so that all scale alike.
        total = squares["replicas"] + shards
        total += sum(_float(bits) for (bits,) in self._gather(_bits(experts)))
        factor = min(1.0, max_norm / (math.sqrt(total) + 1e-6))  # as torch's clip_grad_norm_
        if factor < 1:
            for gradient in gradients.values():
                gradient *= factor

    def count(self) -> None:
        """Enter the rows that have crossed to other sites since the last call into the ledger."""
        mine = sum(exchange.bytes_sent["inter_site"] for exchange in self.exchanges)
        total = int(self.ranks.add_up([mine])[0])
        self.ledger.sent("activations", total - self._counted)
        self._counted = total

    @property
    def seconds(self) -> float:
        """Spent on the way of tokens since the start, waiting for slower sites included."""
        return sum(exchange.seconds for exchange in self.exchanges)

    def _gather(self, value: int) -> list[list[int]]:
        everyones: list[list[int]] = []
        if self.ranks.leader:
            self.ledger.sent("tokens", 8 * (self.transport.sites - 1))
            everyones = self.transport.gather([value])
        return self.ranks.tell(everyones)


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _float(bits: int) -> float:
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)
