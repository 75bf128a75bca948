# SPDX-License-Identifier: Apache-2.0
"""How rows travel between ranks: the interface, and torch.distributed groups behind it.

All ranks make the same calls in the same order, whatever their data: the counts, then a stage at a
time. A call is made even by a rank that has nothing to send.
"""

import datetime
import os
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from fomoe.comm.pairwise import all_to_all
from fomoe.comm.topology import Stage, Topology
from fomoe.errors import CommunicationError

__all__ = ["C10dTransport", "Transport"]

_STAGES: tuple[Stage, ...] = ("intra_node", "inter_site")
_GRACE = 3.0  # seconds in which the members of a failed group find out and say they are there


class Transport(Protocol):
    """One rank's access to the others."""

    topology: Topology
    rank: int

    def gather_counts(self, counts: Tensor) -> Tensor:
        """Everyone's counts: int64 (n,), the same n on all ranks, to int64 (W, n) on the CPU.

        The only call that waits for the device.
        """
        ...

    def all_to_all(
        self, stage: Stage, payload: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        """Send to every member of the stage's group its part of the payload.

        Parameters
        ----------
        stage : Stage
        payload : Tensor, (sum(send),), uint8
        send, receive : list[int]
            Bytes to and from each member of ``topology.group(rank, stage)``.

        Returns
        -------
        Tensor, (sum(receive),), uint8
            By member.

        Raises
        ------
        CommunicationError
            Another rank failed, or gave no sign within the timeout.
        """
        ...


class C10dTransport:
    """Groups of torch.distributed: made here, by all of its ranks together, or a given one.

    Parameters
    ----------
    topology : Topology
        Of one site if a group is given.
    backend : "gloo" | "nccl"
        gloo takes tensors of any device, those of a GPU by way of host memory; NCCL those of GPUs.
    timeout : float
        Seconds after which a call gives up on the others; a given group has its own.
    group : dist.ProcessGroup, optional
        The ranks that tokens travel between, which are numbered as in it. All ranks of
        torch.distributed by default.

    Raises
    ------
    ValueError
        The topology has another number of ranks, or several sites in a given group.
    """

    def __init__(
        self,
        topology: Topology,
        backend: Literal["gloo", "nccl"] = "gloo",
        timeout: float = 600.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.topology = topology
        self._on_host = backend == "gloo"
        self.rank = dist.get_rank(group)
        if dist.get_world_size(group) != topology.num_ranks:
            raise ValueError(
                f"ranks_per_site: expected {dist.get_world_size(group)} ranks, as many as "
                f"torch.distributed has, got {topology.num_ranks}"
            )
        self._roll = _RollCall(self.rank, group)
        self._groups: dict[Stage, dist.ProcessGroup] = {}
        if group is not None:
            if topology.num_sites != 1:
                raise ValueError(
                    f"ranks_per_site: expected one site in a group, got {topology.num_sites}"
                )
            self._world, self._groups["intra_node"] = group, group
            return
        limit = datetime.timedelta(seconds=timeout)
        self._world = dist.new_group(timeout=limit, backend=backend)
        # Every rank has to take part in making every group, in one order.
        for stage in _STAGES:
            ranks = range(topology.num_ranks)
            for members in sorted({tuple(topology.group(rank, stage)) for rank in ranks}):
                made = dist.new_group(list(members), timeout=limit, backend=backend)
                if self.rank in members:
                    self._groups[stage] = made

    def gather_counts(self, counts: Tensor) -> Tensor:
        counts = counts.cpu() if self._on_host else counts
        everyone = [torch.empty_like(counts) for _ in range(self.topology.num_ranks)]
        try:
            dist.all_gather(everyone, counts, group=self._world)
        except RuntimeError as error:
            raise self._roll.call("the counts", range(self.topology.num_ranks), error) from error
        return torch.stack(everyone).cpu()

    def all_to_all(
        self, stage: Stage, payload: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        if stage not in self._groups:  # of a single site
            return payload
        device = payload.device
        payload = payload.cpu() if self._on_host else payload
        arrived = payload.new_empty(sum(receive))
        try:
            all_to_all(arrived, payload, receive, send, self._groups[stage])
        except RuntimeError as error:
            members = self.topology.group(self.rank, stage)
            raise self._roll.call(f"the {stage} stage", members, error) from error
        return arrived.to(device)


class _RollCall:
    """After a failed call: who else is still here to say so."""

    def __init__(self, rank: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        # The store that torch.distributed began with. Older attempts have left names in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        ranks = [] if group is None else dist.get_process_group_ranks(group)
        name = " ".join(["fomoe all-to-all", attempt, *map(str, ranks)])
        self.store = PrefixStore(name, _get_default_store())

    def call(self, what: str, members: Sequence[int], error: Exception) -> CommunicationError:
        """What to raise: the sentence of whoever knew first."""
        try:
            missing = self._missing(members)
            sentence = self._sentence(what, missing)
            sentence = self.store.compare_set("first", "", sentence).decode()
        except RuntimeError:  # the store's host is gone as well
            sentence = self._sentence(what, [])
        return CommunicationError(f"{sentence} ({str(error).splitlines()[0]})")

    def _missing(self, members: Sequence[int]) -> list[int]:
        self.store.set(str(self.rank), "here")
        missing = [member for member in members if member != self.rank]
        deadline = time.monotonic() + _GRACE
        while missing and not self.store.check(["first"]) and time.monotonic() < deadline:
            missing = [member for member in missing if not self.store.check([str(member)])]
            time.sleep(0.02)
        return missing

    def _sentence(self, what: str, missing: Sequence[int]) -> str:
        names = " and ".join(f"rank {member}" for member in missing) or "another rank"
        return f"all-to-all: rank {self.rank} lost {names} in {what}"
