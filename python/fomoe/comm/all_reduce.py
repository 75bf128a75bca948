# SPDX-License-Identifier: Apache-2.0
"""A sum over the ranks of several nodes, of which each element crosses between nodes once.

Inside a node every rank gets the node's sum; of it, each rank's part is added up with those of the
ranks of the same place in other nodes; then the ranks of a node give each other their parts. A ring
over all ranks instead would wait for the slow link in every one of its 2 (n-1) steps.
"""

import datetime
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.comm.pairwise import all_to_all
from fomoe.errors import CommunicationError

__all__ = ["HierarchicalSum"]


class HierarchicalSum:
    """One of the sums of a set of ranks; all ranks of torch.distributed make all of them together.

    Parameters
    ----------
    nodes : Sequence[Sequence[int]]
        The ranks that add up, by node. Nodes with different numbers of ranks are not told apart.
    backend : "gloo" | "nccl"
    timeout : float
        Seconds after which a call gives up on the others.
    """

    def __init__(
        self, nodes: Sequence[Sequence[int]], backend: Literal["gloo", "nccl"], timeout: float
    ) -> None:
        nodes = [list(node) for node in nodes if node]
        if len({len(node) for node in nodes}) > 1:
            nodes = [[rank for node in nodes for rank in node]]
        self.num_nodes, self.ranks_per_node = len(nodes), len(nodes[0])
        self.num_calls = 0
        self.bytes_added = 0
        """Payload of all calls since the beginning."""
        self.bytes_between_nodes = 0
        """Of this rank, what a ring or an exchange of two sends to other nodes."""
        limit, me = datetime.timedelta(seconds=timeout), dist.get_rank()
        self._rank = me
        for node in nodes:
            made = dist.new_group(node, timeout=limit, backend=backend)
            if me in node:
                self._node, self._place = made, node.index(me)
        for ranks in zip(*nodes, strict=True) if len(nodes) > 1 else ():
            made = dist.new_group(list(ranks), timeout=limit, backend=backend)
            if me in ranks:
                self._across = made

    def __call__(self, x: Tensor) -> Tensor:
        """Replace x, contiguous and alike on all ranks, by the sum of theirs; returns it.

        All ranks get the same bits.

        Raises
        ------
        CommunicationError
            Another rank failed, or gave no sign within the timeout.
        """
        self.num_calls += 1
        self.bytes_added += x.numel() * x.element_size()
        try:
            if self.num_nodes == 1 or self.ranks_per_node > 1:
                dist.all_reduce(x, group=self._node)
            if self.num_nodes > 1:
                self._add_nodes(x.view(-1))
        except RuntimeError as error:
            raise CommunicationError(
                f"the sum over ranks: rank {self._rank} lost another one "
                f"({str(error).splitlines()[0]})"
            ) from error
        return x

    def _add_nodes(self, x: Tensor) -> None:
        """Of a vector that the ranks of a node have alike."""
        if self.ranks_per_node == 1:
            self._add_across(x)
            return
        size = -(-x.numel() // self.ranks_per_node)
        padded = x.new_zeros(self.ranks_per_node, size)
        padded.view(-1)[: x.numel()] = x
        part = padded[self._place].clone()
        self._add_across(part)
        dist.all_gather(list(padded), part, group=self._node)
        x.copy_(padded.view(-1)[: x.numel()])

    def _add_across(self, part: Tensor) -> None:
        size = part.numel() * part.element_size()
        self.bytes_between_nodes += 2 * (self.num_nodes - 1) * size // self.num_nodes
        if self.num_nodes > 2:
            dist.all_reduce(part, group=self._across)
            return
        # Two send each other all they have: as much as the two steps of a ring, and one wait less.
        theirs = torch.empty_like(part)
        sizes = [part.numel(), part.numel()]
        sizes[dist.get_rank(self._across)] = 0
        all_to_all(theirs, part, sizes, sizes, self._across)
        part += theirs
