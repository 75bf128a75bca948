# SPDX-License-Identifier: Apache-2.0
"""The rounds of one site: train, meet, evaluate, write files, report."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.comm import C10dTransport, Stage, Topology
from fomoe.comm import Transport as TokenTransport
from fomoe.errors import UserError
from fomoe.federation import site_report
from fomoe.federation.checkpoint import FileRecord
from fomoe.federation.config import Config
from fomoe.federation.exchange import Transport
from fomoe.federation.launch.channel import Channel, Reporter, timing
from fomoe.federation.launch.heartbeat import Heartbeat
from fomoe.federation.launch.membership import SECONDS_IN_A_COLLECTIVE
from fomoe.federation.site import Site
from fomoe.federation.summary import corpus_sha256
from fomoe.federation.task import Task

__all__ = ["WatchedTokenTransport", "WatchedTransport", "check_corpus", "run_rounds"]


def check_corpus(task: Task, site: int, expected: str | None) -> None:
    """Every site reads the data itself; a file may have changed, or be another one here.

    Raises
    ------
    UserError
        Its SHA-256 is not what the coordinator expects.
    """
    found = corpus_sha256(task)
    if found != expected:
        raise UserError(
            f"site {site} read data with SHA-256 {found}, but the coordinator data with {expected}"
        )


def run_rounds(site: Site, channel: Channel, heartbeat: Heartbeat, first_round: int) -> None:
    """Train all rounds from ``first_round`` on, and report each."""
    reporter = Reporter(channel, site.ledger)
    for index in range(first_round, site.config.federation.rounds):
        evaluate, checkpoint = _is_due(site.config, index)
        report = _round(site, index, reporter, heartbeat)
        report |= {"evaluate": evaluate, "checkpoint": checkpoint}
        records: list[FileRecord] = []
        if evaluate:
            heartbeat.doing(f"the evaluation after round {index}")
            report["validation_loss"] = site.validation_loss()
        if evaluate or checkpoint:
            heartbeat.doing(f"the files of round {index}")
            records = site.write(channel.files, with_state=checkpoint)
            report["data_cursor"] = site.task.data_state(site.site)
            _count(site, channel, records, evaluated=evaluate)
        heartbeat.waiting(f"the report of round {index}")
        reporter.round(report, records)


class WatchedTransport:
    """A transport during whose calls the heartbeat says that the site waits for others."""

    def __init__(self, transport: Transport, heartbeat: Heartbeat) -> None:
        self._transport = transport
        self._heartbeat = heartbeat
        self.site = transport.site
        self.sites = transport.sites
        self.seconds = transport.seconds

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        with self._call():
            return self._transport.gather(values)

    def all_to_all(
        self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]
    ) -> None:
        with self._call():
            self._transport.all_to_all(outbox, send, inbox, receive)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._heartbeat.waits():
            yield
        self.seconds = self._transport.seconds


class WatchedTokenTransport:
    """The same for the way that tokens travel; None where they do not."""

    def __init__(self, transport: TokenTransport, heartbeat: Heartbeat) -> None:
        self._transport = transport
        self._heartbeat = heartbeat
        self.topology = transport.topology
        self.rank = transport.rank

    @classmethod
    def between_sites(cls, config: Config, heartbeat: Heartbeat) -> Self | None:
        """For ep, whose experts are on the ranks of all sites; all of them must call it."""
        if config.federation.strategy != "ep":
            return None
        topology = Topology([config.federation.ranks_per_site] * config.federation.sites)
        return cls(C10dTransport(topology, timeout=SECONDS_IN_A_COLLECTIVE), heartbeat)

    @classmethod
    def inside(
        cls, config: Config, site: int, group: dist.ProcessGroup, heartbeat: Heartbeat
    ) -> Self | None:
        """For experts spread over the ranks of a site, all of whom must call it."""
        if not config.federation.spread_experts:
            return None
        transport = C10dTransport(
            Topology([config.federation.ranks_per_site]),
            "gloo" if config.training.device_of(site) == "cpu" else "nccl",
            SECONDS_IN_A_COLLECTIVE,
            group,
        )
        return cls(transport, heartbeat)

    def gather_counts(self, counts: Tensor) -> Tensor:
        with self._heartbeat.waits():
            return self._transport.gather_counts(counts)

    def all_to_all(
        self, stage: Stage, payload: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        with self._heartbeat.waits():
            return self._transport.all_to_all(stage, payload, send, receive)


def _is_due(config: Config, index: int) -> tuple[bool, bool]:
    """Whether an evaluation, and whether a checkpoint, follows the round."""
    last = index + 1 == config.federation.rounds

    def falls_on(every: int) -> bool:
        return last or (every > 0 and (index + 1) % every == 0)

    return falls_on(config.evaluation.every), config.run.save and falls_on(
        config.run.checkpoint_every
    )


def _round(site: Site, index: int, reporter: Reporter, heartbeat: Heartbeat) -> dict[str, Any]:
    """Train a round and meet the others; what the coordinator wants to know of it."""
    begin, exchanged = time.perf_counter(), site.exchange_seconds
    heartbeat.doing(f"the start of round {index}")
    site.begin_round()
    for _ in range(site.config.federation.local_steps):
        heartbeat.doing(f"step {site.step}")
        step = site.local_step()
        reporter.step(step=site.step - 1, loss=step.loss, lr=step.learning_rate)
    memory = site_report.memory(site)
    heartbeat.doing(f"the meeting of round {index}")
    site.end_round()
    heartbeat.doing(f"the report of round {index}")
    memory |= site_report.memory_of_the_meeting(site)
    return {
        "round": index,
        "tokens": site.tokens,
        "rejected": sorted(site.rejected),
        "routing": site.routing(),
        "digests": site_report.digests(site),
        "parameters": sum(tensor.num_elements for tensor in site.tensors_of_all_ranks),
        "owned_parameters": sum(tensor.num_elements for tensor in site.written),
        "threads": torch.get_num_threads(),
        "timings": {
            "seconds": timing(time.perf_counter() - begin),
            "exchange_seconds": timing(site.exchange_seconds - exchanged),
            **{name: timing(memory.pop(name)) for name in list(memory) if name.startswith("peak_")},
        },
        "memory": memory,
    }


def _count(site: Site, channel: Channel, records: list[FileRecord], *, evaluated: bool) -> None:
    """The evaluation takes the model's files; the others cross the network only if they have to."""
    for record in records:
        if evaluated and record.kind == "model":
            site.ledger.sent("evaluation", record.bytes)
        elif channel.files_travel:
            site.ledger.sent("checkpoint", record.bytes)
