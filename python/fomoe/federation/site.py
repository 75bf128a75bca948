# SPDX-License-Identifier: Apache-2.0
"""One site: its part of the model, its local steps, and its side of every meeting.

A site trains ``local_steps`` steps by itself, skipping tokens routed to experts it does not hold
(ddp averages the gradients at every step instead), then takes part in the exchange. Its memory
never holds a tensor of a foreign expert. Where a site has several ranks, every one has a
:class:`Site` and makes the same calls; only the leader's meets the other sites.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe.comm import Transport as TokenTransport
from fomoe.federation.checkpoint import Checkpoint, FileRecord, write_shard
from fomoe.federation.config import Config
from fomoe.federation.exchange import Transport
from fomoe.federation.expert_parallel import ExpertParallelism
from fomoe.federation.inner_optimizer import InnerOptimizer, learning_rate_factor
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.meeting import Meetings
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.placement import Placement, placement_of_round
from fomoe.federation.relocation import Arrivals, relocate
from fomoe.federation.sharding import copy_part, gather
from fomoe.federation.site_ranks import OneRank, SiteRanks
from fomoe.federation.site_state import saved_state
from fomoe.federation.staging import Staging
from fomoe.federation.task import Task
from fomoe.nn import ModelTensor

__all__ = ["LocalStep", "Site"]


@dataclass(frozen=True, slots=True)
class LocalStep:
    """``loss`` of the language model in nats per token, NaN when the site had to skip the step."""

    loss: float
    tokens: int
    learning_rate: float


class Site:
    """The model, optimizers and exchange of one site.

    Parameters
    ----------
    config : Config
    task : Task
    transport : Transport
        This site's way to the others; says which site it is. A
        :class:`~fomoe.federation.exchange.Bystander` on ranks that are not the leader.
    checkpoint : Checkpoint, optional
        Where to go on from: model, optimizer states, momenta and data cursor. Only the leader's
        counts.
    ranks : SiteRanks, optional
        This rank's way to the others of its site, of which there are none by default.
    tokens : TokenTransport, optional
        How tokens travel to other sites; ``federation.strategy = "ep"`` needs it.

    Raises
    ------
    UserError
        The settings do not fit the model, or the checkpoint cannot be read.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        transport: Transport,
        checkpoint: Checkpoint | None = None,
        ranks: SiteRanks | None = None,
        tokens: TokenTransport | None = None,
    ) -> None:
        self.config = config
        self.task = task
        self.transport = transport
        self.ranks: SiteRanks = ranks or OneRank()
        self.site = transport.site
        self.device = torch.device(config.training.device_of(self.site))
        self.ledger = SiteLedger()
        self.expert_parallelism: ExpertParallelism | None = None
        if config.federation.strategy == "ep":
            assert tokens is not None
            self.expert_parallelism = ExpertParallelism(tokens, transport, self.ranks, self.ledger)
        self.staging = Staging(self.device, self.ranks)
        self.round = 0
        """Completed ones."""
        self.step = 0
        """Of the optimizer, since the beginning of the run."""
        self.failed = False
        """Whether the loss of this round was not finite."""
        self.tokens = 0
        """Of this round."""
        self.rejected: set[int] = set()
        """Sites whose contribution did not count in this round."""
        first = 0
        saved = self.ranks.tell(None if checkpoint is None else checkpoint.position)
        if saved is not None:
            self.round, self.step = saved.completed_rounds, saved.step
            with self.ranks.together():
                task.load_data_state(saved.data_cursor)
            # What moves at the beginning of the next round moves there, unless the settings have
            # changed and nothing of the old placement is of use.
            unchanged = saved.placement == self._placement_of(self.round - 1)
            first = self.round - 1 if unchanged else self.round
        self.placement = self._placement_of(first)
        self._build()
        self.meetings = Meetings(
            config.federation, transport, self.ledger, self.tensors_of_all_ranks, self.placement
        )
        if saved is not None:
            self._load(checkpoint)

    def _placement_of(self, round_index: int) -> Placement:
        task = self.task
        return placement_of_round(self.config, task.num_layers, task.num_experts, round_index)

    def _build(self) -> None:
        """The model and the inner optimizer for the placement."""
        if self.expert_parallelism is None:
            model = self.ranks.build(self.task, self.placement.residents(self.site))
        else:
            model = self.expert_parallelism.build(self.task, self.placement)
        self.model = self.ranks.place(model, self.device)
        self.tensors: list[ModelTensor] = federated_tensors(self.model)
        self.tensors_of_all_ranks = self.ranks.tensors_of_the_site(self.model, self.tensors)
        self.optimizer = InnerOptimizer(
            self.tensors, self.config.optimizer, self.config.federation.moved_warmup_steps
        )

    @property
    def averages_gradients(self) -> bool:
        return self.config.federation.meets_every_step

    @property
    def written(self) -> list[ModelTensor]:
        """The tensors this site writes; over all sites, every tensor of the model once."""
        everywhere = [tensor for tensor in self.tensors if tensor.on_every_site]
        mine = [
            tensor
            for tensor in self.tensors_of_all_ranks
            if not tensor.on_every_site
            and tensor.layer is not None
            and tensor.expert is not None
            and self.placement.owner(tensor.layer, tensor.expert) == self.site
        ]
        return [*everywhere[self.site :: self.transport.sites], *mine]

    @property
    def exchange_seconds(self) -> float:
        """Spent in calls to other sites since the start, waiting for slower ones included."""
        of_tokens = 0.0 if self.expert_parallelism is None else self.expert_parallelism.seconds
        return self.transport.seconds + of_tokens

    # ---- training ---------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Move experts if their places have changed, and remember where the round starts."""
        self.failed, self.tokens, self.rejected = False, 0, set()
        if self.round > 0:
            self._move_to(self._placement_of(self.round))
        if not self.averages_gradients:
            self.meetings.begin_round(self.values_on_host())

    def local_step(self) -> LocalStep:
        """One optimizer step.

        A loss that is not finite ends the local steps of the round: what is left of them only
        passes over the data, and the site's contribution will not count.
        """
        with self.ranks.together():
            batch = self.task.batch(self.site, self.step)
        num_tokens = _num_tokens(batch)
        learning_rate = self._learning_rate()
        loss = math.nan if self.failed else self._loss_and_gradients(batch)
        if not math.isfinite(loss):
            self.failed = not self.averages_gradients
        if self.averages_gradients:
            self._average_gradients(num_tokens, failed=not math.isfinite(loss))
        if not self.failed:
            self._clip()
            self.optimizer.step(learning_rate)
        self.step += 1
        self.tokens += num_tokens
        return LocalStep(loss, num_tokens, learning_rate)

    def end_round(self) -> None:
        """Meet the other sites: after this, holders of a tensor hold the same value.

        The model changes only when everything has arrived.

        Raises
        ------
        UserError
            No site has anything to contribute.
        """
        if not self.averages_gradients:
            self._meet()
        self.round += 1

    def _meet(self) -> None:
        moments = {}
        if self.config.federation.outer == "local_adamw":
            moments = {
                kind: self.staging.to_host(kind, values)
                for kind, values in self.optimizer.moments().items()
            }
        values = self.values_on_host()
        meeting = self.meetings.missed()
        with self.ranks.together():
            if self.ranks.leader:
                meeting = self.meetings.meet(values, moments, self.tokens, failed=self.failed)
        self.rejected = set(self.ranks.tell(meeting.attendance.rejected))
        self.ranks.assign(self._values(), meeting.write_value)
        if self.config.federation.outer == "local_adamw":
            for kind, targets in self.optimizer.moments().items():
                self.ranks.assign(targets, partial(meeting.write_moment, kind))
        if self.site in self.rejected:
            # After the others' moments have come: with those the steps it has counted go on.
            self.optimizer.forget(self.ranks.union(self.optimizer.not_finite()))
        self.meetings.commit()

    def _values(self) -> dict[str, Tensor]:
        return {tensor.name: tensor.value for tensor in self.tensors}

    def values_on_host(self) -> Mapping[str, Tensor]:
        """By tensor name; empty on ranks that are not the leader."""
        return self.staging.to_host("values", self._values())

    def _assign(self, values: Iterable[tuple[str, Tensor]]) -> None:
        targets = self._values()
        for name, value in values:
            if name in targets:
                copy_part(targets[name], value)

    def _loss_and_gradients(self, batch: Tensor) -> float:
        """Leaves the site's gradients; returns the language model's loss on its batch."""
        self.model.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, self.ranks.part(batch).to(self.device))
        objective = loss.objective
        if self.expert_parallelism is not None:
            objective = self.expert_parallelism.objective(objective, _num_tokens(batch))
        objective.backward()  # type: ignore[no-untyped-call]
        if self.expert_parallelism is not None:
            self.expert_parallelism.finish_gradients(self.tensors)
            self.expert_parallelism.count()
        return self.ranks.average(self.model, float(loss.language_model.item()))

    def _clip(self) -> None:
        max_norm = self.config.optimizer.clip_norm
        if max_norm <= 0:
            return
        if self.expert_parallelism is None:
            self.ranks.clip(self.model, max_norm)
        else:
            self.expert_parallelism.clip(self.tensors, max_norm)

    def _average_gradients(self, tokens: int, *, failed: bool) -> None:
        for tensor in self.tensors:
            if tensor.is_trained and tensor.parameter.grad is None:
                tensor.parameter.grad = torch.zeros_like(tensor.parameter)
        gradients = {
            tensor.name: tensor.of(tensor.parameter.grad)
            for tensor in self.tensors
            if tensor.parameter.grad is not None
        }
        host = self.staging.to_host("gradients", gradients)
        averaged = self.meetings.missed()
        with self.ranks.together():
            if self.ranks.leader:
                averaged = self.meetings.mean_gradients(host, tokens, failed=failed)
        self.rejected |= set(self.ranks.tell(averaged.attendance.rejected))
        self.ranks.assign(gradients, averaged.values.write)

    def _learning_rate(self) -> float:
        federation, optimizer = self.config.federation, self.config.optimizer
        total_steps = federation.rounds * federation.local_steps
        return optimizer.lr * learning_rate_factor(self.step, total_steps, optimizer)

    def _move_to(self, placement: Placement) -> None:
        """Take leave of the experts that go, and welcome those that come."""
        if placement == self.placement:
            return
        before = self.tensors_of_all_ranks, self.placement
        values, state = self._values(), self.optimizer.state()
        values |= self.ranks.of_others(values)
        state |= self.ranks.of_others(state)
        outer = self.meetings.outer
        keeps_momentum = self.config.federation.outer == "nesterov"
        self.placement = placement
        self._build()
        arrivals = Arrivals({}, {})
        if self.ranks.leader:
            arrivals = relocate(
                before,
                (self.tensors_of_all_ranks, placement),
                values,
                outer.momentum if keeps_momentum else None,
                self.transport,
                self.ledger,
            )
        self._assign(self.ranks.restore(values))
        self._assign(self.ranks.spread(arrivals.weights))
        self.optimizer.load(self.ranks.restore(state))
        known = {tensor.name for tensor in before[0]}
        self.optimizer.warm_up(tensor.name for tensor in self.tensors if tensor.name not in known)
        self.meetings.place(self.tensors_of_all_ranks, placement, arrivals)
        self.staging.keep_only({tensor.name for tensor in self.tensors})

    # ---- what others want to know -----------------------------------------------------------

    def validation_loss(self) -> float:
        """Loss of this site's own part of the model, ghosts skipped, on the validation text."""
        self.model.eval()
        value = self.task.validation_loss(self.model)
        self.model.train()
        self.task.routing(self.model)  # validation does not count in the routing statistics
        if self.expert_parallelism is not None:
            self.expert_parallelism.count()
        return value

    def routing(self) -> list[dict[str, Any]]:
        """Routing statistics per layer of the whole site since the last call."""
        self.ranks.add_up_routing(self.model)
        return self.task.routing(self.model)

    # ---- checkpoint -------------------------------------------------------------------------

    def write(self, folder: Path, *, with_state: bool) -> list[FileRecord]:
        """Write this site's part of the model, and its own state, to a folder that exists.

        Only the leader does; the list is empty on other ranks.
        """
        leader = self.ranks.leader
        mine, values = self.written, self._values()
        values |= self.ranks.of_others(values)
        model = gather({t.name: values[t.name] for t in mine if t.name in values}, keep=leader)
        state: dict[str, Tensor] = {}
        if with_state:
            state = self.optimizer.state()
            state = gather(state | self.ranks.of_others(state), keep=leader)
        records = []
        with self.ranks.together():
            if leader:
                records.append(write_shard(folder, "model", self.site, model))
            if leader and with_state:
                state |= self.meetings.state()
                records.append(write_shard(folder, "state", self.site, state))
        return records

    def _load(self, checkpoint: Checkpoint | None) -> None:
        model: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        with self.ranks.together():
            if checkpoint is not None:
                tensors = self.tensors_of_all_ranks
                model = checkpoint.model({tensor.name for tensor in tensors})
                state = saved_state(checkpoint, self.site, self.placement, tensors, self.meetings)
        self._assign(self.ranks.spread(model))
        names = {tensor.name for tensor in self.tensors_of_all_ranks}
        of_tensors = {key: x for key, x in state.items() if key.rpartition("/")[2] in names}
        self.optimizer.load(self.ranks.spread(of_tensors))
        self.meetings.load(state)


def _num_tokens(batch: Tensor) -> int:
    """Of a (B, S + 1) batch, those that are predicted."""
    return batch.shape[0] * (batch.shape[1] - 1)
