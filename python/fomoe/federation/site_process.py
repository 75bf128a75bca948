# SPDX-License-Identifier: Apache-2.0
"""The process of one site: joins the others, runs the rounds, reports to the coordinator.

Reports are JSON messages over a pipe: ``step`` and ``round`` while training, ``failed`` with a
reason. After a round that wrote files the site waits until the coordinator has dealt with them.
"""

import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint
from fomoe.federation.config import Config
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.site import Site
from fomoe.federation.summary import corpus_sha256
from fomoe.federation.task import Task

__all__ = ["SiteOrder", "run_site", "threads_of_a_site"]


@dataclass(frozen=True)
class SiteOrder:
    """What the coordinator tells a site process; pickled into it.

    ``corpus_sha256`` is of the text the coordinator has read; None when there is none.
    """

    config: Config
    task: Task
    site: int
    run: Path
    rendezvous: Path
    resume: Path | None
    first_round: int
    corpus_sha256: str | None


class Channel:
    """The site's end of the pipe; what it sends is counted as traffic of class ``metrics``."""

    def __init__(self, pipe: "connection.Connection[Any, Any]", ledger: SiteLedger | None) -> None:
        self.pipe = pipe
        self.ledger = ledger

    def send(self, kind: str, **fields: Any) -> None:
        message = _encode(kind, fields)
        if self.ledger is not None:
            self.ledger.sent("metrics", len(message))
        self.pipe.send_bytes(message)

    def send_round(self, ledger: SiteLedger, report: dict[str, Any]) -> None:
        """Send a round's report with the bytes of that round, which this closes.

        The report counts in its own round, but for the counts in it, whose size depends on them.
        """
        ledger.sent("metrics", len(_encode("round", report)))
        self.pipe.send_bytes(_encode("round", report | {"bytes": ledger.close_round()}))

    def wait_for_coordinator(self) -> None:
        self.pipe.recv_bytes()


def run_site(order: SiteOrder, pipe: "connection.Connection[Any, Any]") -> None:
    """Entry point of the process; exits with code 1 after reporting a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to deal with
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked while it started us
    _end_with_the_coordinator()
    channel = Channel(pipe, None)
    try:
        _join(order)
        _train(order, channel)
        channel.send("finished")
        channel.wait_for_coordinator()  # nobody hangs up while a neighbour still reads
    except UserError as error:
        channel.send("failed", user_error=True, reason=str(error))
        sys.exit(1)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        channel.send("failed", user_error=False, reason=reason, trace=traceback.format_exc())
        sys.exit(1)
    dist.destroy_process_group()


def _train(order: SiteOrder, channel: Channel) -> None:
    _check_corpus(order)
    site = Site(order.config, order.task, order.site)
    channel.ledger = site.ledger
    if order.resume is not None:
        site.load(Checkpoint(order.resume))
    federation, evaluation = order.config.federation, order.config.evaluation
    for round_index in range(order.first_round, federation.rounds):
        last = round_index + 1 == federation.rounds
        evaluate = last or (evaluation.every > 0 and (round_index + 1) % evaluation.every == 0)
        report = {"round": round_index, "evaluate": evaluate, **_round(site, channel)}
        if evaluate:
            report |= _evaluation(site, order, with_state=last and order.config.run.save)
        channel.send_round(site.ledger, report)
        if evaluate:
            channel.wait_for_coordinator()


def _check_corpus(order: SiteOrder) -> None:
    """Every site reads the data itself; a file may have changed, or be another one here."""
    found = corpus_sha256(order.task)
    if found != order.corpus_sha256:
        raise UserError(
            f"site {order.site} read data with SHA-256 {found}, "
            f"but the coordinator data with {order.corpus_sha256}"
        )


def _round(site: Site, channel: Channel) -> dict[str, Any]:
    """Train a round and meet the others; what the coordinator wants to know of it."""
    begin, exchanged = time.perf_counter(), site.exchange.seconds
    site.begin_round()
    tokens = _local_steps(site, channel, site.config.federation.local_steps)
    memory = site.memory()
    site.end_round(tokens)
    return {
        "tokens": tokens,
        "seconds": time.perf_counter() - begin,
        "exchange_seconds": site.exchange.seconds - exchanged,
        "routing": site.task.routing(site.model),
        "digests": site.digests(),
        "memory": memory | site.memory_of_the_meeting(),
        "parameters": sum(tensor.num_elements for tensor in site.tensors),
        "owned_parameters": sum(tensor.num_elements for tensor in site.written),
        "threads": torch.get_num_threads(),
    }


def _evaluation(site: Site, order: SiteOrder, *, with_state: bool) -> dict[str, Any]:
    """Evaluate the site's own part and write the files that the coordinator evaluates."""
    validation_loss = site.validation_loss()
    records = site.write(order.run, with_state=with_state)
    snapshot = sum(record.bytes for record in records if record.kind == "model")
    site.ledger.sent("evaluation", snapshot)
    return {"validation_loss": validation_loss, "files": [asdict(record) for record in records]}


def _local_steps(site: Site, channel: Channel, count: int) -> int:
    tokens = 0
    for _ in range(count):
        loss, step_tokens = site.local_step()
        tokens += step_tokens
        learning_rate = site.optimizer.param_groups[0]["lr"]
        channel.send("step", step=site.step - 1, loss=loss, lr=learning_rate)
    return tokens


def _join(order: SiteOrder) -> None:
    sites = order.config.federation.sites
    torch.set_num_threads(threads_of_a_site(order.config))
    # All sites are on this machine: stay off its other networks.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(
        "gloo",
        store=FileStore(str(order.rendezvous), sites),
        rank=order.site,
        world_size=sites,
        timeout=datetime.timedelta(minutes=10),
    )


def threads_of_a_site(config: Config) -> int:
    """CPU threads of every site: as set, or an even share of this machine's cores."""
    return config.training.threads or max(1, (os.cpu_count() or 1) // config.federation.sites)


def _encode(kind: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **fields}).encode()


def _end_with_the_coordinator() -> None:
    """Leave at once when the coordinator is gone, however it went: no orphans."""
    coordinator = parent_process()
    assert coordinator is not None

    def watch() -> None:
        connection.wait([coordinator.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
