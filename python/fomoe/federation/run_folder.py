# SPDX-License-Identifier: Apache-2.0
"""The folder of one run: who may write to it, and what it holds when training begins.

metrics.jsonl    losses of every step, numbers of every round, evaluations
ledger.jsonl     bytes by round, site and traffic class
summary.json     the run as a whole; there once the run has finished
checkpoints/     see fomoe.federation.checkpoint
.lock            locked by the process that trains
"""

import fcntl
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from fomoe.errors import UserError
from fomoe.federation.checkpoint import find_checkpoint, is_round_folder
from fomoe.files import cannot, make_folder, write_text, write_whole

__all__ = ["RunFolder", "run_folder_of", "run_to_resume"]


def run_folder_of(folder: Path) -> Path:
    """The run that ``folder`` stands for: the one whose ``checkpoints`` it is in, or itself."""
    path = folder.resolve()
    if path.parent.name == "checkpoints" and is_round_folder(path):
        return path.parents[1]
    return folder


def run_to_resume(folder: Path) -> Path:
    """The run to go on with, for a run folder or a checkpoint in one.

    Raises
    ------
    UserError
        There is no checkpoint, it is in no run's folder, or not the latest one there.
    """
    checkpoint, run = find_checkpoint(folder), run_folder_of(folder)
    if checkpoint == run:
        raise UserError(
            f"{folder} is a checkpoint outside of a run folder: "
            "expected RUN, or RUN/checkpoints/round-..., to go on with RUN"
        )
    latest = find_checkpoint(run)
    if latest.resolve() != checkpoint.resolve():
        raise UserError(
            f"{folder} is not the latest checkpoint of {run}, that is {latest.name}: "
            "delete the later ones to go on from this one"
        )
    return run


class RunFolder:
    """A run's folder, made if missing and locked as long as the context lasts.

    Raises
    ------
    UserError
        It cannot be written, or another run is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.summary = path / "summary.json"
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Self:
        with cannot(f"write run.folder {self.path}"):
            make_folder(self.path)
            lock = (self.path / ".lock").open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise UserError(f"run.folder {self.path} is in use by another run") from None
            except OSError:
                lock.close()
                raise
        self._lock = lock
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._lock is not None
        self._lock.close()  # and with it the lock; the file stays, or two runs could lock two files

    def begin(self) -> None:
        """Make ready for a new run: nothing of an earlier one without checkpoint remains.

        Raises
        ------
        UserError
            There is a checkpoint already, or the folder cannot be written.
        """
        if any(self.path.glob("checkpoints/round-*")):
            raise UserError(
                f"run.folder {self.path} already holds a checkpoint: "
                f"continue with --resume {self.path}, or choose another run.folder"
            )
        self._forget_summary()

    def cut_back(self, completed_rounds: int, steps: int) -> None:
        """Make ready to go on from a checkpoint: drop what was written after it.

        Raises
        ------
        UserError
            A line before it cannot be read, or the folder cannot be written.
        """

        def is_before(line: Mapping[str, Any]) -> bool:
            if line.get("kind") == "step":
                return bool(line["step"] < steps)
            return bool(line["round"] < completed_rounds)

        self._forget_summary()
        for path in (self.metrics, self.ledger):
            if path.exists():
                _keep_lines(path, is_before)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whole or not at all."""
        with cannot(f"write {self.summary}"):
            write_text(self.summary, json.dumps(summary, indent=1) + "\n")

    def _forget_summary(self) -> None:
        with cannot(f"remove {self.summary}"):
            self.summary.unlink(missing_ok=True)


def _keep_lines(path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines in one step, without those that a crash has damaged at its end.

    What had been synced comes first, so a damaged line before one that is kept is no crash's work.
    """
    with cannot(f"read {path}"):
        lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    kept: list[bytes] = []
    damaged: UserError | None = None
    for number, line in enumerate(lines, start=1):
        try:
            if not is_kept(json.loads(line)):
                continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = damaged or UserError(f"{path} line {number} is damaged: {error!r}")
            continue
        if damaged is not None:
            raise damaged
        kept.append(line)
    with cannot(f"write {path}"):
        write_whole(path, lambda partial: partial.write_bytes(b"".join(kept)))
