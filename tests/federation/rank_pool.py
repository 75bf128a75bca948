# SPDX-License-Identifier: Apache-2.0
"""Processes that are the ranks of two sites, two each, and train what they are told."""

import dataclasses
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from in_process import run_sites
from torch import Tensor, nn

from fomoe.comm import C10dTransport, ExpertExchange, Topology
from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, FileRecord, Manifest, Totals, commit
from fomoe.federation.config import Config
from fomoe.federation.exchange import Bystander, GroupTransport, Transport
from fomoe.federation.health import RoutingHealth
from fomoe.federation.launch.membership import Membership, Seat, join
from fomoe.federation.launch.store import HOST, connect, store_on_this_machine
from fomoe.federation.placement import placement_of_round
from fomoe.federation.sharding import is_sharded, whole
from fomoe.federation.site import Site
from fomoe.federation.site_ranks import OneRank, RankGroup, SiteRanks
from fomoe.federation.site_report import digests
from fomoe.federation.task import Loss
from fomoe.models import Decoder, DecoderConfig
from fomoe.nn import MoE, auxiliary_loss, initialize

SITES, RANKS = 2, 2
BATCH = 4


class DecoderTask:
    """A small decoder on noisy walks over the alphabet; the auxiliary losses may be off.

    ``bad`` are (site, step, sequence) whose loss is not finite.
    """

    num_layers, num_experts = 2, 4

    def __init__(
        self, dtype: torch.dtype = torch.float64, *, auxiliary: bool = False, bad: Any = ()
    ) -> None:
        self.dtype = dtype
        self.bad = frozenset(bad)
        coefficients = (
            {}
            if auxiliary
            else dict.fromkeys(("balance_loss_coefficient", "z_loss_coefficient"), 0.0)
        )
        self.model_config = DecoderConfig(
            vocab_size=256, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
            expert_dim=8, num_experts=4, top_k=2, norm="peri", score="sigmoid", **coefficients,
        )  # fmt: skip
        self.model_settings = dataclasses.asdict(self.model_config)

    def check(self) -> None:
        pass  # there is no text that could be missing

    def build_model(self, residents: Sequence[Sequence[int]] | None) -> nn.Module:
        model = Decoder(self.model_config, residents)
        initialize(model, seed=0)
        return model.to(self.dtype)

    def build_expert_parallel_model(self, exchanges: Sequence[ExpertExchange]) -> nn.Module:
        model = Decoder(self.model_config, exchanges=exchanges)
        initialize(model, seed=0)
        return model.to(self.dtype)

    def batch(self, site: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * site + step)
        tokens = torch.randint(0, 3, (BATCH, 16), generator=generator).cumsum(dim=1) + 1
        for bad_site, bad_step, sequence in self.bad:
            if (bad_site, bad_step) == (site, step):
                tokens[sequence, 0] = 0  # no walk has one
        return tokens

    def data_state(self, site: int) -> dict[str, Any]:
        return {}

    def load_data_state(self, states: Sequence[dict[str, Any]]) -> None:
        assert len(states) == SITES

    def loss(self, model: nn.Module, tokens: Tensor) -> Loss:
        logits = model(tokens[:, :-1]).flatten(0, 1)
        language_model = F.cross_entropy(logits, tokens[:, 1:].flatten())
        if (tokens == 0).any():
            language_model = language_model * float("nan")
        return Loss(language_model + auxiliary_loss(model), language_model)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        return self.loss(model, self.batch(9, 0)).language_model.item()

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        statistics = [dataclasses.asdict(layer.statistics()) for layer in layers]
        for layer in layers:
            layer.reset_statistics()
        return statistics


@dataclasses.dataclass
class Order:
    """What to train: rounds up to ``until``, then write to ``folder`` if there is one."""

    config: Config
    task: DecoderTask
    until: int
    resume: Path | None = None
    folder: Path | None = None


@dataclasses.dataclass
class Report:
    """What a rank knows at the end; ``values`` and ``state`` are whole, ``shards`` how many of the
    tensors are in shards."""

    values: dict[str, Tensor]
    state: dict[str, Tensor]
    shards: int
    losses: list[float]
    tokens: list[int]
    rejected: list[set[int]]
    routing: list[dict[str, Any]]
    digests: dict[str, Any]
    validation: list[float]
    records: list[FileRecord]


def settings(**federation: Any) -> Config:
    values = {"strategy": "fomoe", "overlap": 1, "local_steps": 3, "rounds": 3} | federation
    return Config.from_dict(
        {
            "model": {"num_experts": 4, "top_k": 2},
            "federation": {"sites": SITES, **values},
            "optimizer": {"lr": 0.01, "warmup_steps": 2, "clip_norm": 0.5, "weight_decay": 0.1},
            "training": {"threads": 1, "batch_size": BATCH},
        }
    )


def train(
    order: Order, transport: Transport, ranks: SiteRanks, tokens: C10dTransport | None = None
) -> Report:
    """One rank's part of the rounds."""
    checkpoint = None
    if order.resume is not None and ranks.leader:
        checkpoint = Checkpoint(order.resume)
    site = Site(order.config, order.task, transport, checkpoint, ranks, tokens)
    losses, tokens, rejected, validation = [], [], [], []
    while site.round < order.until:
        site.begin_round()
        losses += [site.local_step().loss for _ in range(order.config.federation.local_steps)]
        site.end_round()
        tokens.append(site.tokens)
        rejected.append(site.rejected)
        routing = site.routing()
        validation.append(site.validation_loss())
    records = [] if order.folder is None else site.write(order.folder, with_state=True)
    return Report(
        {tensor.name: whole(tensor.value).clone() for tensor in site.tensors},
        {name: whole(value).clone() for name, value in site.optimizer.state().items()},
        sum(is_sharded(tensor.value) for tensor in site.tensors),
        losses, tokens, rejected, routing, digests(site), validation, records,
    )  # fmt: skip


def train_alone(order: Order) -> list[Report]:
    """Every site has one rank; reports by site."""
    return run_sites(SITES, lambda transport: train(order, transport, OneRank()))


def make_checkpoint(order: Order, records: Sequence[FileRecord]) -> Path:
    """Of what the sites wrote to ``order.folder``."""
    config, task = order.config, order.task
    placement = placement_of_round(config, task.num_layers, task.num_experts, order.until - 1)
    manifest = Manifest(
        config=config.to_dict(),
        model=task.model_settings,
        completed_rounds=order.until,
        step=order.until * config.federation.local_steps,
        placement=[[list(holders) for holders in layer] for layer in placement.table],
        rng={},
        data_cursor=[{}] * SITES,
        corpus_sha256=None,
        totals=Totals(
            tokens=0,
            seconds=0.0,
            ghost_shares=[],
            routing_health=RoutingHealth(),
            exchange_bytes=[0] * SITES,
            bytes_by_class={},
        ),
        summary={},
        threads_per_site=[1] * SITES,
        versions={},
        files=list(records),
    )
    final = order.folder.with_name("checkpoint")
    commit(order.folder, final, manifest)
    return final


# ---- processes ------------------------------------------------------------------------------


def serve(port: int, seat: Seat, pipe: Any) -> None:
    """Train what comes over the pipe, until it ends."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    membership = join(connect(HOST, port, "test", 60.0), seat, SITES, RANKS)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        try:
            pipe.send(_train_as(membership, order))
        except UserError as error:
            pipe.send(error)


def _train_as(membership: Membership, order: Order) -> Report:
    sharded = order.config.federation.parallel == "fsdp"
    transport: Transport = Bystander(membership.site, SITES)
    if membership.leaders is not None:
        transport = GroupTransport(membership.leaders)
    tokens = None
    if order.config.federation.spread_experts:
        tokens = C10dTransport(Topology([RANKS]), group=membership.inside)
    if order.config.federation.strategy == "ep":
        tokens = C10dTransport(Topology([RANKS] * SITES))
    ranks = RankGroup(membership.inside, sharded=sharded, tokens=tokens)
    return train(order, transport, ranks, tokens)


class RankPool:
    """As a context manager; leaving ends the processes."""

    def __enter__(self) -> "RankPool":
        self._store = store_on_this_machine()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fomoe.federation.launch.site_process", "torch._dynamo"])
        self._pipes, self._processes = [], []
        for seat in (Seat(site, rank) for site in range(SITES) for rank in range(RANKS)):
            mine, theirs = context.Pipe()
            arguments = (self._store.port, seat, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        assert [pipe.recv() for pipe in self._pipes] == ["ready"] * len(self._pipes)
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def train(self, order: Order) -> list[list[Any]]:
        """Reports, or the UserError that ended a rank's part, by site and rank."""
        for pipe in self._pipes:
            pipe.send(order)
        reports = [pipe.recv() for pipe in self._pipes]
        return [reports[site * RANKS : (site + 1) * RANKS] for site in range(SITES)]
