# SPDX-License-Identifier: Apache-2.0
"""The process of one site on the coordinator's machine."""

import datetime
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, incomplete_folder
from fomoe.federation.config import Config
from fomoe.federation.exchange import GroupTransport
from fomoe.federation.launch.channel import PipeChannel, encode
from fomoe.federation.launch.device import use_device
from fomoe.federation.launch.heartbeat import Heartbeat
from fomoe.federation.launch.membership import SECONDS_IN_A_COLLECTIVE, threads_of_a_rank
from fomoe.federation.launch.rounds import (
    WatchedTokenTransport,
    WatchedTransport,
    check_corpus,
    run_rounds,
)
from fomoe.federation.launch.store import HOST, connect
from fomoe.federation.launch.watch import Loss
from fomoe.federation.site import Site
from fomoe.federation.task import Task

__all__ = ["SiteOrder", "run_site"]


@dataclass(frozen=True)
class SiteOrder:
    """What the coordinator tells a site process; pickled into it.

    ``port`` is of the coordinator's store on this machine. ``corpus_sha256`` is of the text the
    coordinator has read; None when there is none.
    """

    config: Config
    task: Task
    site: int
    run: Path
    port: int
    resume: Path | None
    first_round: int
    corpus_sha256: str | None


def run_site(order: SiteOrder, pipe: "connection.Connection[Any, Any]") -> None:
    """Entry point of the process; exits with code 1 after reporting a failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to deal with
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked while it started us
    _end_with_the_coordinator()
    channel = PipeChannel(pipe, incomplete_folder(order.run))
    try:
        with _heartbeat(order) as heartbeat:
            _train(order, channel, heartbeat)
            heartbeat.waiting("the end of the run")
            channel.transmit(encode("finished", {}))
            channel.wait_for_coordinator()  # nobody hangs up while a neighbour still reads
    except UserError as error:
        channel.transmit(encode("failed", {"user_error": True, "reason": str(error)}))
        sys.exit(1)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        fields = {"user_error": False, "reason": reason, "trace": traceback.format_exc()}
        channel.transmit(encode("failed", fields))
        sys.exit(1)
    dist.destroy_process_group()


def _train(order: SiteOrder, channel: PipeChannel, heartbeat: Heartbeat) -> None:
    _join(order)
    use_device(order.config.training.device_of(order.site), order.site)
    check_corpus(order.task, order.site, order.corpus_sha256)
    checkpoint = None if order.resume is None else Checkpoint(order.resume)
    transport = WatchedTransport(GroupTransport(), heartbeat)
    tokens = WatchedTokenTransport.between_sites(order.config, heartbeat)
    site = Site(order.config, order.task, transport, checkpoint, tokens=tokens)
    run_rounds(site, channel, heartbeat, order.first_round)


def _join(order: SiteOrder) -> None:
    sites = order.config.federation.sites
    torch.set_num_threads(threads_of_a_rank(order.config, sites))
    # All sites are on this machine: stay off its other networks.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(
        "gloo",
        store=connect(HOST, order.port, "group", SECONDS_IN_A_COLLECTIVE),
        rank=order.site,
        world_size=sites,
        timeout=datetime.timedelta(seconds=SECONDS_IN_A_COLLECTIVE),
    )


def _heartbeat(order: SiteOrder) -> Heartbeat:
    """It watches the coordinator, which watches all sites."""
    federation = order.config.federation

    def lost(loss: Loss | None) -> None:
        if loss is not None:
            print(f"site {order.site} ends: {loss.sentence}", file=sys.stderr, flush=True)
        os._exit(1)

    return Heartbeat(
        connect(HOST, order.port, "beats", SECONDS_IN_A_COLLECTIVE),
        me=order.site,
        watched={federation.sites: "the coordinator"},
        timeout=federation.timeout,
        store_name="the coordinator",
        lost=lost,
    )


def _end_with_the_coordinator() -> None:
    """Leave at once when the coordinator is gone, however it went: no orphans."""
    coordinator = parent_process()
    assert coordinator is not None

    def watch() -> None:
        connection.wait([coordinator.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
