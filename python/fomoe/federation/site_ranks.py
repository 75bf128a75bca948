# SPDX-License-Identifier: Apache-2.0
"""The ranks of a site: processes, a device each, that share its work over a fast network.

Every rank trains with its part of the site's batch, and all take the same optimizer steps with the
mean of their gradients; experts may be spread over the ranks. The first one is the leader: it alone
meets the other sites, reads and writes checkpoints, and tells the others what came of it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fomoe.comm import Transport as TokenTransport
from fomoe.errors import UserError
from fomoe.federation.sharding import clip_gradients, copy_part, is_sharded, shard
from fomoe.federation.spread_experts import SpreadExperts
from fomoe.federation.task import Task
from fomoe.nn import ModelTensor, RoutedLayer
from fomoe.nn.expert_parallel import clip_grad_norm, expert_parameters, finish_expert_gradients

__all__ = ["OneRank", "RankGroup", "SiteRanks"]

_Value = TypeVar("_Value")


class SiteRanks(Protocol):
    """One rank's access to the others of its site, all of whom make the same calls."""

    leader: bool

    def build(self, task: Task, residents: Sequence[Sequence[int]]) -> nn.Module:
        """The initialised model with this rank's share of the residents, by layer."""
        ...

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on the device of this rank, or this rank's part of it."""
        ...

    def tensors_of_the_site(
        self, model: nn.Module, tensors: Sequence[ModelTensor]
    ) -> list[ModelTensor]:
        """Those of this rank's model, and without their values what other ranks alone have."""
        ...

    def part(self, batch: Tensor) -> Tensor:
        """The sequences, of the site's (B, S + 1), that are this rank's."""
        ...

    def average(self, model: nn.Module, loss: float) -> float:
        """Give all ranks the mean of their gradients, and return that of their losses."""
        ...

    def clip(self, model: nn.Module, max_norm: float) -> None:
        """Scale the gradients so that the norm over the whole model is at most ``max_norm``."""
        ...

    def add_up(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, the same on each."""
        ...

    def of_others(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What belongs to these, by name or ``KIND/NAME``, and other ranks alone have.

        In host memory, for the leader; empty on other ranks.
        """
        ...

    def restore(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Values from before experts moved, the leader's with those of others, for every rank."""
        ...

    def assign(self, targets: Mapping[str, Tensor], write: Callable[[str, Tensor], None]) -> None:
        """Overwrite tensors on all ranks with what ``write(name, target)`` gives the leader's.

        Only the leader calls it, and for every sharded tensor it must write all of it.
        """
        ...

    def spread(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The leader's values, one after another; those of other ranks are not looked at."""
        ...

    def tell(self, value: _Value) -> _Value:
        """The leader's value, which is small and can be pickled."""
        ...

    def union(self, names: Collection[str]) -> set[str]:
        """The names of all ranks."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """A block that no rank leaves alone: what one raises as a UserError, all do."""
        ...

    def add_up_routing(self, model: nn.Module) -> None:
        """Give all ranks the sum of what their routers have counted."""
        ...


class OneRank:
    """A site of a single rank, which has nobody to share with."""

    leader = True

    def build(self, task: Task, residents: Sequence[Sequence[int]]) -> nn.Module:
        return task.build_model(residents)

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model.to(device)

    def tensors_of_the_site(
        self, model: nn.Module, tensors: Sequence[ModelTensor]
    ) -> list[ModelTensor]:
        return list(tensors)

    def part(self, batch: Tensor) -> Tensor:
        return batch

    def average(self, model: nn.Module, loss: float) -> float:
        return loss

    def clip(self, model: nn.Module, max_norm: float) -> None:
        clip_gradients(model.parameters(), max_norm)

    def add_up(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def of_others(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def restore(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return iter(values.items())

    def assign(self, targets: Mapping[str, Tensor], write: Callable[[str, Tensor], None]) -> None:
        for name, target in targets.items():
            write(name, target)

    def spread(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        return iter(values.items())

    def tell(self, value: _Value) -> _Value:
        return value

    def union(self, names: Collection[str]) -> set[str]:
        return set(names)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def add_up_routing(self, model: nn.Module) -> None:
        pass


class RankGroup:
    """Several ranks that talk by a torch.distributed group, whose rank 0 is the leader.

    Parameters
    ----------
    group : dist.ProcessGroup
        For tensors in host memory and on the ranks' devices: backend ``gloo`` on CPUs, and
        ``cpu:gloo,cuda:nccl`` on GPUs.
    sharded : bool
        Whether the shared parameters are in shards (``federation.parallel = "fsdp"``), or every
        rank has all of them.
    tokens : TokenTransport, optional
        Every expert is on a single rank; says how tokens travel to it, between the ranks of the
        site (``federation.spread_experts``) or of all sites (``federation.strategy = "ep"``).
        Without it every rank has all experts of the site.
    waiting : Callable[[], AbstractContextManager[None]]
        Entered whenever this rank may have to wait for another one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        sharded: bool,
        tokens: TokenTransport | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.group = group
        self.sharded = sharded
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.leader = self.rank == 0
        self.device = torch.device("cpu")
        self._waiting = waiting
        self.spread_experts = None if tokens is None else SpreadExperts(tokens, group, waiting)

    def build(self, task: Task, residents: Sequence[Sequence[int]]) -> nn.Module:
        if self.spread_experts is None:
            return task.build_model(residents)
        return self.spread_experts.build(task, residents)

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        self.device = device
        if not self.sharded:
            return model.to(device)
        shard(model, self.group, device)
        return model

    def tensors_of_the_site(
        self, model: nn.Module, tensors: Sequence[ModelTensor]
    ) -> list[ModelTensor]:
        if self.spread_experts is None:
            return list(tensors)
        return self.spread_experts.tensors_of_the_site(model, tensors)

    def part(self, batch: Tensor) -> Tensor:
        if len(batch) % self.size:
            raise ValueError(
                f"a batch of {len(batch)} sequences cannot be split evenly among "
                f"{self.size} ranks of a site"
            )
        return batch.chunk(self.size)[self.rank]

    def average(self, model: nn.Module, loss: float) -> float:
        finish_expert_gradients(model, self.size)
        own = {id(parameter) for parameter in expert_parameters(model).values()}
        # FSDP averages what it shards.
        parameters = [p for p in model.parameters() if not is_sharded(p) and id(p) not in own]
        present = [parameter.grad is not None for parameter in parameters]
        totals = torch.tensor([loss, *present], dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(totals, group=self.group)
        mean_loss = float(totals[0]) / self.size
        holders = totals[1:].tolist()
        gradients = []
        for parameter, count in zip(parameters, holders, strict=True):
            if count > 0:  # else the optimizer passes over it, as with one rank
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        pending = [dist.all_reduce(x, group=self.group, async_op=True) for x in gradients]
        for gradient, work in zip(gradients, pending, strict=True):
            assert work is not None
            work.wait()
            gradient /= self.size
        return mean_loss

    def clip(self, model: nn.Module, max_norm: float) -> None:
        if self.spread_experts is None:
            clip_gradients(model.parameters(), max_norm)
        else:
            clip_grad_norm(model, max_norm, self.group)

    def add_up(self, values: Sequence[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(totals, group=self.group)
        return totals.tolist()

    def of_others(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if self.spread_experts is None else self.spread_experts.collect(values)

    def restore(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        spread = {} if self.spread_experts is None else self.spread_experts.of(values)
        yield from ((name, value) for name, value in values.items() if name not in spread)
        if self.spread_experts is not None:
            yield from self.spread(spread)

    def assign(self, targets: Mapping[str, Tensor], write: Callable[[str, Tensor], None]) -> None:
        spread = {} if self.spread_experts is None else self.spread_experts.of(targets)
        if self.spread_experts is not None:
            self.spread_experts.assign(spread, write)
        for name, target in targets.items():
            if name in spread:
                continue
            value = target
            if is_sharded(target):
                value = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if self.leader:
                write(name, value)
            with self._waiting(), torch.no_grad():
                dist.broadcast(value, group_src=0, group=self.group)
            if value is not target:
                copy_part(target, value)

    def spread(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        contents = self.tell([(name, x.shape, x.dtype) for name, x in values.items()])
        for name, shape, dtype in contents:
            value = (
                values[name].to(self.device).contiguous()
                if self.leader
                else torch.empty(shape, dtype=dtype, device=self.device)
            )
            with self._waiting():
                dist.broadcast(value, group_src=0, group=self.group)
            yield name, value

    def tell(self, value: _Value) -> _Value:
        box = [value if self.leader else None]
        with self._waiting():
            dist.broadcast_object_list(
                box, group_src=0, group=self.group, device=torch.device("cpu")
            )
        told: Any = box[0]
        return told  # type: ignore[no-any-return]

    def union(self, names: Collection[str]) -> set[str]:
        return {name for theirs in self._everyones(sorted(names)) for name in theirs}

    @contextmanager
    def together(self) -> Iterator[None]:
        mistake = ""
        try:
            yield
        except UserError as error:
            mistake = str(error)
        mistakes = [each for each in self._everyones(mistake) if each]
        if mistakes:
            raise UserError(mistakes[0])

    def add_up_routing(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, RoutedLayer):
                for counts in (module.expert_counts, module.num_rows):
                    dist.all_reduce(counts, group=self.group)

    def _everyones(self, value: _Value) -> list[_Value]:
        everyone: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone
