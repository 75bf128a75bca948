# SPDX-License-Identifier: Apache-2.0
"""Exchange of bytes between ranks over NCCL, in the two stages of an all-to-all."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fomoe.comm.topology import Stage, Topology
from fomoe.errors import CommunicationError

__all__ = ["STAGES", "NcclTransport"]

STAGES: dict[Stage, int] = {"intra_node": 0, "inter_site": 1}
"""Codes of the stages in torch.ops.fomoe_nccl."""
_LIBRARY = "nccl/lib/libnccl.so.2"


class NcclTransport:
    """One rank's end of a world, on the current CUDA device; a :class:`fomoe.comm.Transport`.

    Every rank makes the same calls in the same order; on the device they run in this order,
    whatever their streams. Use one rank per process, and from one thread at a time.

    Parameters
    ----------
    topology : Topology
    rank : int
        World rank of the caller.
    unique_id : bytes, 128
        From :meth:`unique_id` of one rank, handed to all.
    timeout : float, seconds
        For setting up, and for every call on its own.

    Raises
    ------
    ValueError
        When the timeout is not positive.
    RuntimeError
        When the rank does not fit, there is no NCCL or one older than 2.18, no CUDA device, or a
        rank does not come within the timeout.
    CommunicationError
        From any later call, when a rank failed or fell silent. All communicators are aborted then,
        and every later call raises the same error. An exchange that nobody has waited for may fail
        afterwards: what it received is to be used only if a later call, :meth:`check` for example,
        does not raise.
    """

    def __init__(
        self, topology: Topology, rank: int, unique_id: bytes, timeout: float = 600.0
    ) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        self.topology = topology
        self.rank = rank
        _open_library()
        self._communicator = torch.ops.fomoe_nccl.create(
            torch.frombuffer(bytearray(unique_id), dtype=torch.uint8),
            list(topology.ranks_per_site),
            rank,
            round(1000 * timeout),
            torch.cuda.current_device() if torch.cuda.is_available() else 0,
        )

    @staticmethod
    def unique_id() -> bytes:
        """What the ranks of a new world need to find each other, 128 bytes. Raises RuntimeError
        when there is no NCCL to ask."""
        _open_library()
        return bytes(torch.ops.fomoe_nccl.unique_id().tolist())

    def group(self, stage: Stage) -> list[int]:
        """The ranks of a stage's communicator: those of ``topology.group(rank, stage)``."""
        group: list[int] = torch.ops.fomoe_nccl.group(self._communicator, STAGES[stage])
        return group

    def gather_counts(self, counts: Tensor) -> Tensor:
        """``counts`` of every rank; waits for them.

        counts : Tensor, (n,), int64, the same n on every rank. Returns (W, n), int64, on the CPU.
        """
        with _named():
            gathered: Tensor = torch.ops.fomoe_nccl.gather_counts(self._communicator, counts.cpu())
        return gathered

    def all_to_all(
        self, stage: Stage, payload: Tensor, send: list[int], receive: list[int]
    ) -> Tensor:
        """Bytes to and from every rank of the stage's group, on torch's current stream.

        Parameters
        ----------
        stage : "intra_node" | "inter_site"
        payload : Tensor, (sum of send,), uint8, CUDA
            What goes to the first rank of the group, then what goes to the second, and so on.
        send, receive : list of int
            Bytes to and from every rank of the group. What a rank sends another is what that one
            receives from it.

        Returns
        -------
        Tensor, (sum of receive,), uint8, CUDA
        """
        with _named():
            received: Tensor = torch.ops.fomoe_nccl.all_to_all(
                self._communicator, STAGES[stage], payload, send, receive
            )
        return received

    def check(self) -> None:
        """Raises if an exchange has failed; does not wait for those under way."""
        with _named():
            torch.ops.fomoe_nccl.check(self._communicator)

    def abort(self) -> None:
        """Ends the calls of this rank with an error, and those of its peers within their timeout.
        May be called from any thread."""
        torch.ops.fomoe_nccl.abort(self._communicator)

    def close(self) -> None:
        """Waits, at most the timeout, for what is under way and for the other ranks to close; the
        transport cannot be used any more."""
        torch.ops.fomoe_nccl.destroy(self._communicator)


@contextmanager
def _named() -> Iterator[None]:
    """What the op raises, as the error of every transport."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(str(error)) from error


def _open_library() -> None:
    """Opens the NCCL that torch has loaded, or else that of the package nvidia-nccl."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    files = [str(path) for folder in folders or () for path in Path(folder).glob(_LIBRARY)]
    path = bytearray((files or [""])[0].encode())
    empty = torch.empty(0, dtype=torch.uint8)
    torch.ops.fomoe_nccl.open(torch.frombuffer(path, dtype=torch.uint8) if path else empty)
