# SPDX-License-Identifier: Apache-2.0
"""Reports and files of the sites' leaders on their way to the coordinator, under torchrun.

The coordinator's work is done by the leader of site 0, so its messages and files go nowhere. The
files of the other sites do not either, where these see the coordinator's run folder.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fomoe.federation.checkpoint import Checkpoint, FileRecord, incomplete_folder
from fomoe.federation.launch.channel import decode
from fomoe.federation.launch.coordinator import Coordinator
from fomoe.federation.launch.file_transfer import (
    gather_bytes,
    receive_bytes,
    receive_file,
    send_bytes,
    send_file,
)
from fomoe.federation.launch.heartbeat import Heartbeat
from fomoe.files import cannot, write_text

__all__ = ["GroupChannel", "Travel", "mark"]


_MARK = ".attempt-"


@contextmanager
def mark(run: Path, attempt: str) -> Iterator[None]:
    """A file in the coordinator's run folder by which the other sites know it; gone afterwards."""
    path = _mark(run, attempt)
    with cannot(f"write {path}"):
        for old in run.glob(f"{_MARK}*"):  # of an attempt that was killed
            old.unlink()
        write_text(path, "")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _mark(run: Path, attempt: str) -> Path:
    return run / f"{_MARK}{attempt}"


@dataclass(frozen=True)
class Travel:
    """Which sites do not see the coordinator's run folder, and how files get there and back.

    ``run`` is the run folder as this site finds it, ``away`` says by site who sees another one.
    """

    group: dist.ProcessGroup
    site: int
    run: Path
    away: tuple[bool, ...]

    @staticmethod
    def plan(group: dist.ProcessGroup, run: Path, attempt: str) -> "Travel":
        """Look for the coordinator's mark, together with all other leaders."""
        mine = torch.tensor([not _mark(run, attempt).exists()])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        away = tuple(bool(theirs) for theirs in everyone)
        return Travel(group, dist.get_rank(group), run, away)

    @property
    def is_away(self) -> bool:
        return self.away[self.site]

    @contextmanager
    def outbox(self) -> Iterator[Path]:
        """The folder that this site writes its files to."""
        if not self.is_away:
            yield incomplete_folder(self.run)
            return
        folder = self.run / f".site-{self.site}"
        shutil.rmtree(folder, ignore_errors=True)
        with cannot(f"write run.folder {self.run}"):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it is not empty: another site or run uses it
                self.run.rmdir()

    def collect(self, records: Sequence[Sequence[FileRecord]]) -> None:
        """On the coordinator: take the files, given by site, of all who are away."""
        for sender in range(1, len(self.away)):
            for record in records[sender] if self.away[sender] else ():
                receive_file(incomplete_folder(self.run), record, sender, self.group)

    def hand_over(self, folder: Path, records: Sequence[FileRecord]) -> None:
        """On a site that is away: give its files to the coordinator, and remove them here."""
        for record in records:
            send_file(folder / record.name, record.bytes, 0, self.group)
            (folder / record.name).unlink()

    def send_checkpoint(self, checkpoint: Checkpoint) -> None:
        """On the coordinator: give the checkpoint to all who are away."""
        manifest = (checkpoint.folder / "manifest.json").read_bytes()
        for site, is_away in enumerate(self.away):
            if is_away:
                send_bytes(manifest, site, self.group)
                for record in checkpoint.files:
                    send_file(checkpoint.folder / record.name, record.bytes, site, self.group)

    def receive_checkpoint(self, folder: Path) -> Checkpoint:
        """On a site that is away: the checkpoint, in a folder of its own."""
        manifest = receive_bytes(0, self.group)
        with cannot(f"write {folder}"):
            (folder / "manifest.json").write_bytes(manifest)
        checkpoint = Checkpoint(folder)
        for record in checkpoint.files:
            receive_file(folder, record, 0, self.group)
        return checkpoint

    def remove(self, checkpoint: Checkpoint) -> None:
        """On a site that is away: the checkpoint has been read."""
        for record in checkpoint.files:
            (checkpoint.folder / record.name).unlink()
        (checkpoint.folder / "manifest.json").unlink()


class GroupChannel:
    """Keeps the messages of a round and gathers them at its end.

    ``coordinator`` is None but on the leader of site 0.
    """

    def __init__(
        self,
        travel: Travel,
        files: Path,
        coordinator: Coordinator | None,
        heartbeat: Heartbeat,
    ) -> None:
        self.files = files
        self.files_travel = travel.is_away
        self._travel = travel
        self._coordinator = coordinator
        self._heartbeat = heartbeat
        self._messages: list[bytes] = []

    def transmit(self, message: bytes) -> None:
        self._messages.append(message)

    def end_round(self, records: Sequence[FileRecord]) -> None:
        everyone = gather_bytes(b"\n".join(self._messages), self._travel.group)
        self._messages.clear()
        if self._coordinator is None:
            if self.files_travel:
                self._travel.hand_over(self.files, records)
            return
        messages = [[decode(line) for line in lines.split(b"\n")] for lines in everyone]
        reports = [lines[-1] for lines in messages]
        if records:
            self._travel.collect([[FileRecord(**f) for f in r["files"]] for r in reports])
        self._heartbeat.doing(f"the reports of round {reports[0]['round']}")
        for site, lines in enumerate(messages):
            for line in lines:
                self._coordinator.receive(site, line)
