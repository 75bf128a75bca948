# SPDX-License-Identifier: Apache-2.0
"""A site's experts over its ranks: each rank has some, and tokens travel to them (our choice).

The leader meets the other sites and writes files for all experts of the site, so it gets copies of
those of other ranks in host memory, and hands back what becomes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe.comm import ExpertExchange, Transport
from fomoe.federation.task import Task, expert_parallel_model
from fomoe.nn import ModelTensor
from fomoe.nn.expert_parallel import expert_parameters

__all__ = ["SpreadExperts"]


class SpreadExperts:
    """One rank's part in it; all ranks of the site make the same calls.

    Parameters
    ----------
    tokens : Transport
        How rows of tokens travel between the ranks of the site.
    group : dist.ProcessGroup
        The same ranks, for tensors in host memory; its rank 0 is the leader.
    waiting : Callable[[], AbstractContextManager[None]]
        Entered whenever this rank may have to wait for another one.
    """

    def __init__(
        self,
        tokens: Transport,
        group: dist.ProcessGroup,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.tokens = tokens
        self.group = group
        self.leader = dist.get_rank(group) == 0
        self._waiting = waiting
        self._names: set[str] = set()
        """Of all tensors that have ever been some rank's alone."""

    def build(self, task: Task, residents: Sequence[Sequence[int]]) -> nn.Module:
        """The model with this rank's share of each layer's residents, contiguous ones."""
        ranks = self.tokens.topology.num_ranks
        exchanges = []
        for layer in residents:
            owners = [-1] * task.num_experts
            for index, expert in enumerate(layer):
                owners[expert] = index * ranks // len(layer)
            exchanges.append(ExpertExchange(self.tokens, owners))
        return expert_parallel_model(task, exchanges, "federation.spread_experts")

    def tensors_of_the_site(
        self, model: nn.Module, tensors: Sequence[ModelTensor]
    ) -> list[ModelTensor]:
        """Those of this rank and, without their values, of the others, as if one rank had all."""
        own = {id(parameter) for parameter in expert_parameters(model).values()}
        told = [
            (t.name, t.layer, t.expert, t.value.shape, t.parameter.dtype, t.is_trained)
            for t in tensors
            if id(t.parameter) in own
        ]
        known = {tensor.name for tensor in tensors}
        of_experts = [tensor for tensor in tensors if tensor.expert is not None]
        for entries in self._everyones(told):
            for name, layer, expert, shape, dtype, is_trained in entries:
                self._names.add(name)
                if name not in known:
                    value = torch.empty(shape, dtype=dtype, device="meta")
                    parameter = nn.Parameter(value, requires_grad=is_trained)
                    of_experts.append(ModelTensor(name, parameter, None, layer, expert, False))
        of_experts.sort(key=lambda tensor: (tensor.layer, tensor.expert))  # stable
        return [tensor for tensor in tensors if tensor.expert is None] + of_experts

    def of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of these, by name or ``KIND/NAME``, single ranks have."""
        return {key: x for key, x in values.items() if key.rpartition("/")[2] in self._names}

    def collect(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the other ranks have of their experts, in host memory; empty but at the leader."""
        own = self.of(values)
        contents = self._everyones([(key, x.shape, x.dtype) for key, x in own.items()])
        collected = {}
        if self.leader:
            for rank, entries in enumerate(contents[1:], start=1):
                for key, shape, dtype in entries:
                    collected[key] = self._receive(shape, dtype, rank)
        else:
            for value in own.values():
                self._send(value, 0)
        return collected

    def assign(self, targets: Mapping[str, Tensor], write: Callable[[str, Tensor], None]) -> None:
        """Overwrite every rank's targets with what ``write(name, target)`` gives at the leader."""
        contents = self._everyones([(name, x.shape, x.dtype) for name, x in targets.items()])
        if not self.leader:
            for target in targets.values():
                value = self._receive(target.shape, target.dtype, 0)
                with torch.no_grad():
                    target.copy_(value)
            return
        for name, target in targets.items():
            write(name, target)
        for rank, entries in enumerate(contents[1:], start=1):
            for name, shape, dtype in entries:
                value = torch.empty(shape, dtype=dtype)
                write(name, value)
                self._send(value, rank)

    def _send(self, value: Tensor, rank: int) -> None:
        with self._waiting():
            dist.send(value.detach().cpu().contiguous(), group=self.group, group_dst=rank)

    def _receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
        value = torch.empty(shape, dtype=dtype)
        with self._waiting():
            dist.recv(value, group=self.group, group_src=rank)
        return value

    def _everyones(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        with self._waiting():
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone
