# SPDX-License-Identifier: Apache-2.0
"""Files from one machine to another, in chunks through a torch.distributed group."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.checkpoint import FileRecord
from fomoe.files import cannot, sync_file

__all__ = ["gather_bytes", "receive_bytes", "receive_file", "send_bytes", "send_file"]

_CHUNK = 16 * 2**20


def send_file(path: Path, size: int, to: int, group: dist.ProcessGroup) -> None:
    """Send a file of ``size`` bytes to rank ``to`` of the group.

    Raises
    ------
    UserError
        It cannot be read, or is shorter by now.
    """
    with cannot(f"read {path}"), path.open("rb") as file:
        for chunk in _chunks(size):
            if file.readinto(chunk.numpy().data) != chunk.numel():
                raise UserError(f"cannot read {path}: it has less than {size} bytes")
            dist.send(chunk, group=group, group_dst=to)


def receive_file(folder: Path, record: FileRecord, sender: int, group: dist.ProcessGroup) -> None:
    """Receive the file of ``record`` into ``folder`` from a rank of the group; it is on disk then.

    Raises
    ------
    UserError
        It cannot be written, or is not the one that the record describes.
    """
    path, digest = folder / record.name, hashlib.sha256()
    with cannot(f"write {path}"), path.open("wb", buffering=0) as file:
        for chunk in _chunks(record.bytes):
            dist.recv(chunk, group=group, group_src=sender)
            digest.update(chunk.numpy().data)
            rest = chunk.numpy().data
            while rest:
                rest = rest[file.write(rest) :]
        sync_file(path)
    if digest.hexdigest() != record.sha256:
        raise UserError(
            f"{path} came from site {sender} with SHA-256 {digest.hexdigest()[:12]}..., "
            f"expected {record.sha256[:12]}..."
        )


def send_bytes(message: bytes, to: int, group: dist.ProcessGroup) -> None:
    """Send bytes, as many as :func:`receive_bytes` finds."""
    dist.send(torch.tensor([len(message)]), group=group, group_dst=to)
    dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), group=group, group_dst=to)


def receive_bytes(sender: int, group: dist.ProcessGroup) -> bytes:
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, group=group, group_src=sender)
    message = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(message, group=group, group_src=sender)
    return message.numpy().tobytes()


def gather_bytes(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Everyone's bytes, by rank of the group, on its rank 0; an empty list on the others."""
    if dist.get_rank(group) > 0:
        send_bytes(mine, 0, group)
        return []
    return [mine, *(receive_bytes(s, group) for s in range(1, dist.get_world_size(group)))]


def _chunks(size: int) -> Sequence[Tensor]:
    """Buffers that add up to ``size`` bytes; the full ones are one and the same."""
    buffer = torch.empty(min(size, _CHUNK), dtype=torch.uint8)
    return [buffer[: min(_CHUNK, size - begin)] for begin in range(0, size, _CHUNK)]
