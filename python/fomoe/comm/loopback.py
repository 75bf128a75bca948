# SPDX-License-Identifier: Apache-2.0
"""All ranks in one process, a thread each: for tests, and to count bytes without a network."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fomoe.comm.topology import Stage, Topology
from fomoe.errors import CommunicationError

__all__ = ["LoopbackTransport", "run_ranks"]

_Result = TypeVar("_Result")
_Call = tuple[str, Tensor, list[int]]  # what, payload, bytes for each member


class _World:
    """What the ranks of a process share: by group of ranks, a place for everyone's last call."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.calls: dict[tuple[int, ...], dict[int, _Call]] = {}
        self.barriers: dict[tuple[int, ...], threading.Barrier] = {}
        self.lock = threading.Lock()
        self.aborted = False

    def barrier(self, group: tuple[int, ...]) -> threading.Barrier:
        with self.lock:
            if group not in self.barriers:
                self.barriers[group] = threading.Barrier(len(group), timeout=self.timeout)
                self.calls[group] = {}
            if self.aborted:
                self.barriers[group].abort()
            return self.barriers[group]

    def abort(self) -> None:
        with self.lock:
            self.aborted = True
            for barrier in self.barriers.values():
                barrier.abort()


class LoopbackTransport:
    """The transport of a rank that is a thread of this process."""

    def __init__(self, topology: Topology, rank: int, world: _World) -> None:
        self.topology = topology
        self.rank = rank
        self._world = world

    @classmethod
    def of_all_ranks(cls, topology: Topology, timeout: float = 60.0) -> "list[LoopbackTransport]":
        """One for each rank; a call gives up after ``timeout`` seconds."""
        world = _World(timeout)
        return [cls(topology, rank, world) for rank in range(topology.num_ranks)]

    def abort(self) -> None:
        """End the calls of all ranks, those to come as well."""
        self._world.abort()

    def gather_counts(self, counts: Tensor) -> Tensor:
        calls = self._meet("counts", range(self.topology.num_ranks), counts, [])
        return torch.stack([theirs for _, theirs, _ in calls.values()]).cpu()

    def all_to_all(
        self, stage: Stage, payload: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        group = self.topology.group(self.rank, stage)
        place, parts = group.index(self.rank), []
        calls = self._meet(stage, group, payload, send)
        for count, (member, (_, theirs, sizes)) in zip(receive, calls.items(), strict=True):
            if sizes[place] != count:
                raise CommunicationError(
                    f"all-to-all: rank {self.rank} expects {count} bytes of rank {member} in the "
                    f"{stage} stage, which sends {sizes[place]}"
                )
            parts.append(theirs.split_with_sizes(sizes)[place])
        return torch.cat(parts)

    def _meet(
        self, what: str, group: Sequence[int], payload: Tensor, send: list[int]
    ) -> dict[int, _Call]:
        """The calls of the group, by rank."""
        barrier = self._world.barrier(tuple(group))
        board = self._world.calls[tuple(group)]
        board[self.rank] = (what, payload, send)
        try:
            barrier.wait()
            calls = {member: board[member] for member in group}
            barrier.wait()  # nobody makes the next call before all have read this one
        except threading.BrokenBarrierError:
            raise CommunicationError(
                f"all-to-all: rank {self.rank} lost another rank in {what}"
            ) from None
        for member, (theirs, _, _) in calls.items():
            if theirs != what:
                raise CommunicationError(
                    f"all-to-all: rank {self.rank} calls {what}, but rank {member} calls {theirs}"
                )
        return calls


def run_ranks(
    topology: Topology, program: Callable[[LoopbackTransport], _Result], timeout: float = 60.0
) -> list[_Result]:
    """Run ``program`` once per rank, each in a thread, and return what they return, by rank.

    Raises
    ------
    Exception
        What the first rank that failed raised; the others end.
    """

    def run(transport: LoopbackTransport) -> _Result:
        try:
            return program(transport)
        except BaseException:
            transport.abort()
            raise

    with ThreadPoolExecutor(topology.num_ranks) as pool:
        transports = LoopbackTransport.of_all_ranks(topology, timeout)
        futures = [pool.submit(run, transport) for transport in transports]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        # Those who only lost the others say less than the one who failed.
        raise next((e for e in errors if not isinstance(e, CommunicationError)), errors[0])
    return [future.result() for future in futures]
