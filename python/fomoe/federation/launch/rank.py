# SPDX-License-Identifier: Apache-2.0
"""One rank of torchrun: who it is, who else is there, and how it ends."""

import datetime
import ipaddress
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn, Self

import torch.distributed as dist

from fomoe.errors import CommunicationError, SiteFailed, UserError
from fomoe.federation.config import Config
from fomoe.federation.launch.coordinator import where_to_go_on
from fomoe.federation.launch.ending import Ending, Verdict, leave, on_termination
from fomoe.federation.launch.heartbeat import Heartbeat, prepare
from fomoe.federation.launch.membership import (
    SECONDS_IN_A_COLLECTIVE,
    Membership,
    Newcomer,
    Seat,
    assign,
    join,
)
from fomoe.federation.launch.roll import call_the_roll
from fomoe.federation.launch.store import PrefixStore, Store, TCPStore, connect
from fomoe.federation.launch.watch import Loss
from fomoe.federation.resume import differences

__all__ = ["Rank"]

_SECONDS_TO_JOIN = 300.0
# Settings that may differ from machine to machine.
_OF_A_MACHINE = {"run", "data.paths", "training.threads", "training.device"}


class Rank:
    """This rank among the others, as a context manager; within it, every failure ends all ranks.

    ``store`` holds the keys of this attempt; ``store_of_all_attempts`` those that stay over
    restarts by torchrun.
    """

    membership: Membership
    heartbeat: Heartbeat

    def __init__(self, config: Config, site: int | None) -> None:
        self.config = config
        federation = config.federation
        self.machine = int(os.environ["GROUP_RANK"])
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _stay_on_the_loopback_interface(self._host)
        self._server = self._host_the_store()
        self.store_of_all_attempts = self._connect("fomoe")
        mine = Newcomer(self.machine, int(os.environ["GROUP_WORLD_SIZE"]), site, os.getpid())
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt, everyone = call_the_roll(
            self.store_of_all_attempts,
            rank,
            ranks,
            {"newcomer": asdict(mine), "settings": config.to_dict()},
            _SECONDS_TO_JOIN,
        )
        self.store = self._connect(f"fomoe/{self.attempt}")
        newcomers = [Newcomer(**line["newcomer"]) for line in everyone]
        try:
            seats = assign(newcomers, federation.sites, federation.ranks_per_site)
            self.seat = seats[rank]
            self._compare(everyone[seats.index(Seat(0, 0))]["settings"])
        except UserError as error:
            self._ending_beside({}).end(Verdict(str(error), 2))
        self.members = [seat.rank(federation.ranks_per_site) for seat in seats]
        self.me = self.members[rank]
        self._names = {m: self._name(s) for m, s in zip(self.members, seats, strict=True)}
        self.ending = self._ending_beside(
            {
                member: newcomer.process
                for member, newcomer in zip(self.members, newcomers, strict=True)
                if newcomer.machine == self.machine and member != self.me
            }
        )

    def __enter__(self) -> Self:
        if self.me == 0:
            prepare(self.store, len(self.members))
            self.store.set("prepared", "")
        self.store.wait(["prepared"])
        on_termination(self._terminated)
        self.heartbeat = Heartbeat(
            self._connect(f"fomoe/{self.attempt}"),
            me=self.me,
            watched={m: name for m, name in self._names.items() if m != self.me},
            timeout=self.config.federation.timeout,
            store_name=f"the store of torchrun at {self._host}:{self._port}",
            lost=self._lost,
        )
        self.heartbeat.__enter__()
        try:
            self.membership = self._join()
        except Exception as error:
            self._failed(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        if error is not None:
            self._failed(error)
        self.heartbeat.__exit__()

    def _failed(self, error: BaseException) -> NoReturn:
        if isinstance(error, UserError):
            self.ending.end(Verdict(str(error), 2))
        if isinstance(error, SiteFailed):
            self._lost(Loss(None, error.sentence))
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        if _is_of_a_collective(error):
            sentence = f"{self._names[self.me]} lost the others ({first_line})"
            self._lost(self.heartbeat.suspect() or Loss(None, sentence))
        traceback.print_exception(error)
        self._lost(Loss(None, f"{self._names[self.me]} failed: {first_line}"))

    def _lost(self, loss: Loss | None) -> NoReturn:
        """End the run; None: for the reason that somebody has left in the store."""
        member, sentence = loss or Loss(None, "the run has ended")
        hint = where_to_go_on(self.heartbeat.checkpoint)
        self.ending.end(Verdict(f"{sentence}; {hint}", 1, member))

    def _terminated(self, number: int) -> None:
        """Torchrun ends all ranks of a machine when one is gone, or when it is told to end."""
        if number == signal.SIGINT:
            leave(130)  # somebody sits in front of it
        member = self.ending.dead_neighbour()
        if member is not None:
            self._lost(Loss(member, f"the process of {self._names[member]} died"))
        self._lost(Loss(None, "torchrun ended the ranks of this machine"))

    @property
    def leaders(self) -> dist.ProcessGroup:
        """The group of the sites' leaders, of whom this is one."""
        assert self.membership.leaders is not None
        return self.membership.leaders

    # ---- the store ----------------------------------------------------------------------------

    def _host_the_store(self) -> TCPStore | None:
        """Torchrun hosts it on its first machine, or says that rank 0 has to."""
        if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True" or os.environ["RANK"] != "0":
            return None
        timeout = datetime.timedelta(seconds=_SECONDS_TO_JOIN)
        return TCPStore(
            self._host, self._port, is_master=True, wait_for_workers=False, timeout=timeout
        )

    def _connect(self, prefix: str) -> Store:
        return connect(self._host, self._port, prefix, SECONDS_IN_A_COLLECTIVE)

    def _ending_beside(self, neighbours: Mapping[int, int]) -> Ending:
        return Ending(self._connect(f"fomoe/{self.attempt}"), self.machine, neighbours)

    def _join(self) -> Membership:
        federation = self.config.federation
        store = PrefixStore("group", self._connect(f"fomoe/{self.attempt}"))
        device = self.config.training.device_of(self.seat.site)
        return join(store, self.seat, federation.sites, federation.ranks_per_site, device)

    def _compare(self, settings_of_site_0: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.config.to_dict()))
        for key, theirs, own in differences(settings_of_site_0, mine, _OF_A_MACHINE):
            raise UserError(
                f"{key} is {own!r} for site {self.seat.site}, but {theirs!r} for site 0: "
                "give all ranks the same settings"
            )

    def _name(self, seat: Seat) -> str:
        if self.config.federation.ranks_per_site == 1:
            return f"site {seat.site}"
        return f"rank {seat.rank_in_site} of site {seat.site}"


def _stay_on_the_loopback_interface(host: str) -> None:
    """Where all ranks are on this machine, keep gloo off its other networks."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if loopback or os.environ["GROUP_WORLD_SIZE"] == "1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it: then it is mostly an echo of another rank's failure."""
    if isinstance(error, CommunicationError):
        return True
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    return any(os.path.join("torch", "distributed", "") in frame.filename for frame in frames)
