# SPDX-License-Identifier: Apache-2.0
"""One site: its part of the model, its local steps, and its side of every meeting.

A site trains ``local_steps`` steps by itself, skipping tokens routed to experts it does not hold
(ddp averages the gradients at every step instead), then takes part in the exchange. Its memory
never holds a tensor of a foreign expert.
"""

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, FileRecord, write_shard
from fomoe.federation.config import Config, OptimizerConfig
from fomoe.federation.exchange import Exchange
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.memory import memory_by_class, peak_rss, tensor_bytes
from fomoe.federation.outer_optimizer import Average, Nesterov, OuterOptimizer
from fomoe.federation.parameters import FederatedTensor, federated_tensors
from fomoe.federation.placement import Placement
from fomoe.federation.task import Task

__all__ = ["Site", "learning_rate_factor"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Site:
    """The model, optimizers and exchange of one site; needs an initialised process group."""

    def __init__(self, config: Config, task: Task, site: int) -> None:
        federation = config.federation
        self.config = config
        self.task = task
        self.site = site
        self.ledger = SiteLedger()
        self.placement = Placement(
            task.num_layers, task.num_experts, federation.sites, federation.overlap
        )
        self.model = task.build_model(self.placement.residents(site))
        self.tensors: list[FederatedTensor] = federated_tensors(self.model)
        self.exchange = Exchange(self.tensors, self.placement, site, self.ledger)
        self.optimizer = _inner_optimizer(self.model, config.optimizer)
        self.outer: OuterOptimizer = (
            Nesterov(federation.outer_lr, federation.outer_momentum)
            if federation.outer == "nesterov"
            else Average()
        )
        self.start: dict[str, Tensor] = {}
        self.step = 0
        shared = [tensor for tensor in self.tensors if tensor.is_shared]
        self.written = [*shared[site :: federation.sites], *self.exchange.owned]
        """The tensors this site writes; over all sites, every tensor of the model once."""

    @property
    def averages_gradients(self) -> bool:
        return self.config.federation.strategy == "ddp"

    # ---- training ---------------------------------------------------------------------------

    def local_step(self) -> tuple[float, int]:
        """One optimizer step; returns the language-model loss (nats per token) and its tokens.

        Raises
        ------
        UserError
            When the loss is not finite.
        """
        settings = self.config.optimizer
        tokens = self.task.batch(self.site, self.step)
        num_tokens = tokens.shape[0] * (tokens.shape[1] - 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, tokens)
        loss.objective.backward()  # type: ignore[no-untyped-call]
        value = loss.language_model.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss of site {self.site} is {value} at step {self.step}: "
                f"lower optimizer.lr (now {settings.lr}) or set optimizer.clip_norm"
            )
        if self.averages_gradients:
            self._average_gradients(num_tokens)
        if settings.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self._set_learning_rate()
        self.optimizer.step()
        self.step += 1
        return value, num_tokens

    def begin_round(self) -> None:
        """Remember where the round starts, when the outer optimizer needs it."""
        if not self.averages_gradients and self.outer.needs_start:
            self.start = {tensor.name: tensor.value.clone() for tensor in self.tensors}

    def end_round(self, tokens: int) -> None:
        """Meet the other sites: after this, holders of a tensor hold the same value.

        Everything happens in scratch tensors; the model changes only when all have arrived.
        """
        if self.averages_gradients:
            return
        contributions = {
            tensor.name: self.outer.contribution(self.start.get(tensor.name), tensor.value)
            for tensor in self.tensors
        }
        means = self.exchange.reduce(contributions, tokens)
        del contributions
        results = self.exchange.distribute(
            {name: self.outer.reduce(name, mean) for name, mean in means.items()}
        )
        with torch.no_grad():
            for tensor in self.tensors:
                start = self.start.get(tensor.name)
                tensor.value.copy_(self.outer.result(start, results[tensor.name]))
        self.outer.commit()
        self.start = {}

    def digests(self) -> dict[str, Any]:
        """SHA-256 of what this site holds in common with others, who must have the same.

        ``shared``: of the shared tensors. ``expert``: by group of holders, written ``"0,2"``, of
        the experts that exactly these sites hold.
        """
        shared = hashlib.sha256()
        experts: dict[str, Any] = {}
        for tensor in self.tensors:
            digest = shared
            if tensor.layer is not None and tensor.expert is not None:
                holders = self.placement.holders(tensor.layer, tensor.expert)
                digest = experts.setdefault(",".join(map(str, holders)), hashlib.sha256())
            digest.update(tensor.value.contiguous().view(-1).view(torch.uint8).numpy().data)
        return {
            "shared": shared.hexdigest(),
            "expert": {group: digest.hexdigest() for group, digest in experts.items()},
        }

    def validation_loss(self) -> float:
        """Loss of this site's own part of the model, ghosts skipped, on the validation text."""
        self.model.eval()
        value = self.task.validation_loss(self.model)
        self.model.train()
        self.task.routing(self.model)  # validation does not count in the routing statistics
        return value

    def memory(self) -> dict[str, int]:
        """Bytes of this site's tensors by class, before a meeting, when most of them exist."""
        return memory_by_class(self.model, self.optimizer, self.start)

    def memory_of_the_meeting(self) -> dict[str, int]:
        """What a meeting adds: the most that its contributions, buffers and means took at once at
        a collective, the momentum of owned tensors, and the peak resident set of the process."""
        return {
            "outer_momentum": tensor_bytes(self.outer.momentum.values()),
            "exchange_buffers": self.exchange.peak_scratch_bytes,
            "peak_rss": peak_rss(),
        }

    def _average_gradients(self, tokens: int) -> None:
        gradients = {
            tensor.name: tensor.of(
                torch.zeros_like(tensor.parameter)
                if tensor.parameter.grad is None
                else tensor.parameter.grad
            )
            for tensor in self.tensors
        }
        averaged = self.exchange.distribute(self.exchange.reduce(gradients, tokens))
        for tensor in self.tensors:
            if tensor.parameter.grad is None:
                tensor.parameter.grad = torch.zeros_like(tensor.parameter)
            tensor.of(tensor.parameter.grad).copy_(averaged[tensor.name])

    def _set_learning_rate(self) -> None:
        federation = self.config.federation
        factor = learning_rate_factor(
            self.step, federation.rounds * federation.local_steps, self.config.optimizer
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor

    # ---- checkpoint -------------------------------------------------------------------------

    def write(self, folder: Path, *, with_state: bool) -> list[FileRecord]:
        """Write this site's part of the model, and its own state, to a folder."""
        model = {tensor.name: tensor.value for tensor in self.written}
        records = [write_shard(folder, "model", self.site, model)]
        if with_state:
            records.append(write_shard(folder, "state", self.site, self._state()))
        return records

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same settings: model, moments, momentum, cursor."""
        model = checkpoint.model({tensor.name for tensor in self.tensors})
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.value.copy_(model[tensor.name])
        state = checkpoint.state(self.site)
        self.step = int(checkpoint.manifest["step"])
        prefix = "outer_momentum/"
        self.outer.momentum = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        for tensor in self.tensors:
            with suppress(KeyError):  # a parameter that never had a gradient has no moments
                self._load_moments(tensor, state)

    def _state(self) -> dict[str, Tensor]:
        state = {f"outer_momentum/{name}": value for name, value in self.outer.momentum.items()}
        for tensor in self.tensors:
            moments = self.optimizer.state.get(tensor.parameter, {})
            for kind in _MOMENTS:
                if kind in moments:
                    state[f"{kind}/{tensor.name}"] = tensor.of(moments[kind])
            if "step" in moments:
                state[f"adamw_step/{tensor.name}"] = moments["step"]
        return state

    def _load_moments(self, tensor: FederatedTensor, state: Mapping[str, Tensor]) -> None:
        step = state[f"adamw_step/{tensor.name}"]
        moments: dict[str, Any] = self.optimizer.state[tensor.parameter]
        moments["step"] = step
        for kind in _MOMENTS:
            if kind not in moments:
                moments[kind] = torch.zeros_like(tensor.parameter)
            tensor.of(moments[kind]).copy_(state[f"{kind}/{tensor.name}"])


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerConfig) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine from 1 down to ``min_lr_ratio``."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine


def _inner_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=False
        )
    # One tensor at a time: the arithmetic of the oracle in examples/nano_fomoe.py, to the bit.
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
        fused=False,
    )
