# SPDX-License-Identifier: Apache-2.0
"""A federation whose sites are threads of one process; any call of the transport can fail."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fomoe.comm import LoopbackTransport, Topology
from fomoe.federation.exchange import Attendance, Exchange, Piece, Results
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.site import Site

_Result = TypeVar("_Result")


class Turns:
    """In the place of a barrier: one site works at a time, so that every run is the same sequence.

    The last to arrive hands over to the first, which thus goes on when all have arrived.
    """

    def __init__(self, sites: int) -> None:
        self.sites = sites
        self.next = 0
        self.broken = False
        self.changed = threading.Condition()
        self.me = threading.local()

    def begin(self, site: int) -> None:
        self.me.site = site
        self._await_my_turn()

    def wait(self) -> None:
        self.end()
        self._await_my_turn()

    def end(self) -> None:
        with self.changed:
            self.next = (self.next + 1) % self.sites
            self.changed.notify_all()

    def abort(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def _await_my_turn(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.broken or self.next == self.me.site, timeout=60)
            if self.next != self.me.site or self.broken:
                raise threading.BrokenBarrierError


class Network:
    """What the transports of one federation have in common."""

    def __init__(self, sites: int, barrier: threading.Barrier | Turns | None = None) -> None:
        self.sites = sites
        self.barrier = barrier or threading.Barrier(sites, timeout=60)
        self.board: dict[int, Any] = {}


class ThreadTransport:
    """One site's access; ``before_call`` runs first in every call and may raise."""

    def __init__(
        self, network: Network, site: int, before_call: Callable[[], None] = lambda: None
    ) -> None:
        self.network = network
        self.site = site
        self.sites = network.sites
        self.seconds = 0.0
        self.before_call = before_call

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        everyone = self._exchange(list(values))
        assert len({len(theirs) for theirs in everyone}) == 1
        return everyone

    def all_to_all(
        self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]
    ) -> None:
        assert outbox.dtype == torch.uint8
        assert sum(send) == outbox.numel()
        parts = self._exchange(torch.split(outbox.clone(), send))
        mine = [parts[site][self.site] for site in range(self.sites)]
        assert [part.numel() for part in mine] == receive
        torch.cat(mine, out=inbox)

    def _exchange(self, mine: Any) -> list[Any]:
        self.before_call()
        self.network.board[self.site] = mine
        self.network.barrier.wait()
        everyone = [self.network.board[site] for site in range(self.sites)]
        self.network.barrier.wait()
        return everyone


def run_sites(
    sites: int,
    work: Callable[[ThreadTransport], _Result],
    before_call: Callable[[int], Callable[[], None]] = lambda site: lambda: None,
    barrier: Turns | None = None,
) -> list[_Result]:
    """What ``work`` returns at every site; raises what the first site to fail raised."""
    network, results, errors = Network(sites, barrier), {}, []

    def run(site: int) -> None:
        torch.set_num_threads(1)
        try:
            results[site] = work(ThreadTransport(network, site, before_call(site)))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            network.barrier.abort()

    threads = [threading.Thread(target=run, args=(site,)) for site in range(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[site] for site in range(sites)]


def train_in_threads(config: Any, task: Any) -> list[Site]:
    """All rounds of a run without coordinator and files."""

    tokens: list[Any] = [None] * config.federation.sites
    if config.federation.strategy == "ep":
        tokens = LoopbackTransport.of_all_ranks(Topology([1] * config.federation.sites))

    def work(transport: ThreadTransport) -> Site:
        site = Site(config, task, transport, tokens=tokens[transport.site])
        for _ in range(config.federation.rounds):
            site.begin_round()
            for _ in range(config.federation.local_steps):
                site.local_step()
            site.end_round()
        return site

    return run_sites(config.federation.sites, work)


def values_of(results: Results, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The results by tensor name, flat."""
    ends = {piece.tensor: piece.stop for piece in pieces}
    values = {name: torch.empty(ends[name]) for name in results}
    for name, value in values.items():
        results.write(name, value)
    return values


def meet(
    pieces: Callable[[int], Sequence[Piece]],
    values: Callable[[int], dict[str, Tensor]],
    codec: Any,
    tokens: Sequence[int],
    rejected: Sequence[int] = (),
) -> list[dict[str, Tensor]]:
    """One exchange of means; the results by site."""

    def work(transport: ThreadTransport) -> dict[str, Tensor]:
        site = transport.site
        exchange = Exchange(pieces(site), transport, SiteLedger(), codec)
        attendance: Attendance = exchange.attend(tokens[site], rejected=site in rejected)
        means = exchange.reduce(exchange.pack(values(site)), attendance)
        return values_of(exchange.distribute(means, attendance), exchange.pieces)

    return run_sites(len(tokens), work)
