# SPDX-License-Identifier: Apache-2.0
"""Where the groups of a Federation of Experts are: the ranks of each, and the mean over all groups.

With at most as many ranks as groups, every rank has one or several whole groups, and all ranks have
the same tokens: what crosses between them is one all-reduce a layer (FoE, arXiv 2605.06206). With
more ranks, those of a group are neighbours that share out its experts and the tokens: rank
``group * members + member`` has the tokens of its ``member``. Tokens then travel among the ranks of
a group, and the mean is over the ranks of the same member.

G groups held here of H.
"""

import datetime
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe.comm import C10dTransport, ExpertExchange, HierarchicalSum, Topology
from fomoe.models.foe.attention import GroupAttention
from fomoe.models.foe.config import FoEConfig
from fomoe.nn import RoutedLayer
from fomoe.nn.expert_parallel import finish_expert_gradients

__all__ = ["GroupRanks"]


class GroupRanks:
    """This rank's groups, and its way to the ranks of the others; all ranks make one together.

    Parameters
    ----------
    config : FoEConfig
    nodes : Sequence[int], optional
        How many ranks each node has, in order; one node by default. Between nodes, what crosses
        is each element once, see :class:`fomoe.comm.HierarchicalSum`.
    backend : "gloo" | "nccl"
    timeout : float
        Seconds after which a call gives up on the others.

    Raises
    ------
    ValueError
        If the number of ranks neither divides the number of groups nor is a multiple of it, a
        group would have more ranks than experts, or be on two nodes; or the nodes' ranks are not
        all ranks.
    """

    def __init__(
        self,
        config: FoEConfig,
        nodes: Sequence[int] | None = None,
        backend: Literal["gloo", "nccl"] = "gloo",
        timeout: float = 600.0,
    ) -> None:
        world, rank, num_groups = dist.get_world_size(), dist.get_rank(), config.num_groups
        self.members = members_of_a_group(world, config)
        self.member = rank % self.members
        """Which part of the tokens is here, of as many as a group has ranks."""
        self.num_groups = num_groups
        per_rank = max(1, num_groups // world)
        first = rank // self.members * per_rank
        self.groups = range(first, first + per_rank)
        self.num_holders = num_groups // per_rank
        """Ranks that have the same tokens, among which the groups are."""
        node_of = node_of_rank([world] if nodes is None else nodes, world, self.members)
        # Every rank has to take part in making every group, in one order.
        for member in range(self.members):
            holders = range(member, world, self.members)
            made = HierarchicalSum(
                [[r for r in holders if node_of[r] == node] for node in range(max(node_of) + 1)],
                backend,
                timeout,
            )
            if member == self.member:
                self.sum = made
        for group in range(num_groups if self.members > 1 else 0):
            ranks = list(range(group * self.members, (group + 1) * self.members))
            limit = datetime.timedelta(seconds=timeout)
            within = dist.new_group(ranks, timeout=limit, backend=backend)
            if rank in ranks:
                self._within = within
                self._transport = C10dTransport(Topology([self.members]), backend, group=within)
        self._owners = _owners(config, first, self.members)

    def exchange(self) -> ExpertExchange | None:
        """A layer's way to the experts of this group on its other ranks; None if there are none."""
        if self.members == 1:
            return None
        return ExpertExchange(self._transport, self._owners)

    def mean(self, x_GBSD: Tensor) -> Tensor:
        """The mean over all H groups of what the ranks have for theirs, (B, S, D).

        The gradient is the sum over the ranks, for each uses the mean for its own groups.
        """
        return _Mean.apply(x_GBSD, self)  # type: ignore[no-any-return, no-untyped-call]

    def last_mean(self, x_GBSD: Tensor) -> Tensor:
        """:meth:`mean` where all ranks go on alike, with the logits of :meth:`alike`."""
        return _LastMean.apply(x_GBSD, self)  # type: ignore[no-any-return, no-untyped-call]

    def alike(self, logits: Tensor) -> Tensor:
        """Logits that all ranks have and make the same loss of: each takes its part of that."""
        return _ShareOfGradient.apply(logits, self.num_holders)  # type: ignore[no-any-return,no-untyped-call]

    def finish_gradients(self, model: nn.Module) -> None:
        """After the backward: what all ranks have gets the gradient of all tokens and groups.

        The loss of all is the mean of those of the ranks with different tokens. A collective call
        of all ranks.
        """
        finish_expert_gradients(model, self.members)
        layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
        experts = {id(p) for layer in layers for p in layer.experts.parameters()}
        attentions = [module for module in model.modules() if isinstance(module, GroupAttention)]
        of_groups = {id(p) for attention in attentions for p in attention.parameters()}
        for parameter in model.parameters():
            if not parameter.requires_grad or id(parameter) in experts:
                continue
            if id(parameter) in of_groups and self.members == 1:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(
                parameter.grad, group=self._within if id(parameter) in of_groups else None
            )
            parameter.grad /= self.members


def members_of_a_group(world: int, config: FoEConfig) -> int:
    """Ranks per group among ``world``, 1 if there are no more of them than groups."""
    num_groups = config.num_groups
    if world <= num_groups and num_groups % world == 0:
        return 1
    if world % num_groups != 0 or world < num_groups:
        raise ValueError(
            f"ranks: expected a divisor or a multiple of the model's {num_groups} groups, "
            f"got {world}"
        )
    if world // num_groups > config.experts_per_group:
        raise ValueError(
            f"ranks: expected at most {config.num_experts}, one for each expert, got {world}"
        )
    return world // num_groups


def _owners(config: FoEConfig, group: int, members: int) -> list[int]:
    """Which member of a group has each expert, neighbours together; -1 outside of the group."""
    size = config.experts_per_group
    owners = [-1] * config.num_experts
    for expert in range(size):
        owners[group * size + expert] = expert * members // size
    return owners


def node_of_rank(nodes: Sequence[int], world: int, members: int) -> list[int]:
    """The node of every rank, whose groups of ``members`` must each be on one."""
    node_of = [node for node, count in enumerate(nodes) for _ in range(count)]
    if len(node_of) != world:
        raise ValueError(f"nodes: expected {world} ranks in all, got {len(node_of)}")
    for first in range(0, world, members):
        if len(set(node_of[first : first + members])) > 1:
            raise ValueError(
                f"nodes: expected the {members} ranks of a group on one node, "
                f"got ranks {first} to {first + members - 1} on two"
            )
    return node_of


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_GBSD: Tensor, ranks: GroupRanks) -> Tensor:
        ctx.ranks, ctx.num_here = ranks, x_GBSD.shape[0]
        return ranks.sum(x_GBSD.sum(dim=0)) / ranks.num_groups

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = ctx.ranks.sum(gradients[0].clone(memory_format=torch.contiguous_format))
        return (total / ctx.ranks.num_groups).expand(ctx.num_here, *total.shape), None


class _LastMean(torch.autograd.Function):
    """Its gradient is the same on all ranks, a part of the whole: no need to add it up."""

    @staticmethod
    def forward(ctx: Any, x_GBSD: Tensor, ranks: GroupRanks) -> Tensor:
        ctx.ranks, ctx.num_here = ranks, x_GBSD.shape[0]
        return ranks.sum(x_GBSD.sum(dim=0)) / ranks.num_groups

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0] * (ctx.ranks.num_holders / ctx.ranks.num_groups)
        return whole.expand(ctx.num_here, *whole.shape), None


class _ShareOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_ranks: int) -> Tensor:
        ctx.num_ranks = num_ranks
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.num_ranks, None
