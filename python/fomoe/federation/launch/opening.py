# SPDX-License-Identifier: Apache-2.0
"""Before the first round: the run folder made ready to begin in, or to go on in."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomoe.errors import UserError
from fomoe.federation.checkpoint import Checkpoint, find_checkpoint
from fomoe.federation.config import Config
from fomoe.federation.placement import placement_of_round
from fomoe.federation.resume import check_corpus, check_settings, notes
from fomoe.federation.run_folder import RunFolder, run_to_resume
from fomoe.federation.summary import corpus_sha256
from fomoe.federation.task import Task

__all__ = ["Opening", "begin", "check_placement", "go_on", "has_checkpoint"]


@dataclass(frozen=True)
class Opening:
    """A run folder that is ready: for the first round, or for those after ``checkpoint``.

    ``corpus_sha256`` is of the text; None for a task without one. ``summary`` is there when no
    round is left. ``config`` names the folder that is used.
    """

    config: Config
    folder: RunFolder
    corpus_sha256: str | None
    checkpoint: Checkpoint | None
    summary: dict[str, Any] | None = None

    @property
    def first_round(self) -> int:
        if self.checkpoint is None:
            return 0
        completed: int = self.checkpoint.manifest["completed_rounds"]
        return completed


def check_placement(config: Config, task: Task) -> None:
    """Raise UserError when the sites cannot hold equally many experts."""
    placement_of_round(config, task.num_layers, task.num_experts, 0)


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    try:
        run_to_resume(run)
    except UserError:
        return False
    return True


def begin(config: Config, task: Task, folder: RunFolder) -> Opening:
    """Open the locked folder for a new run.

    Raises
    ------
    UserError
        It holds a checkpoint.
    """
    folder.begin()
    return Opening(_in_folder(config, folder), folder, corpus_sha256(task), None)


def go_on(
    config: Config, task: Task, folder: RunFolder, threads: int, *, restarted: bool = False
) -> Opening:
    """Open the locked folder to go on from its latest checkpoint.

    Parameters
    ----------
    threads
        CPU threads that a site has now.
    restarted
        Whether a launcher starts the same command again: then it is no mistake of the user's when
        all rounds have been completed.

    Raises
    ------
    UserError
        The checkpoint is damaged, of other settings or of another text; nothing is left to do.
    """
    checkpoint = Checkpoint(find_checkpoint(folder.path))
    manifest = checkpoint.manifest
    check_settings(manifest, config, folder.path)
    corpus = corpus_sha256(task)
    check_corpus(manifest, corpus, folder.path)
    checkpoint.verify()
    task.check()
    completed, rounds = manifest["completed_rounds"], config.federation.rounds
    has_summary = folder.summary.exists() and not restarted
    if completed > rounds or (completed == rounds and has_summary):
        raise UserError(
            f"{folder.path} has completed {completed} rounds already: set federation.rounds "
            f"(now {rounds}) higher to go on"
        )
    folder.cut_back(completed, manifest["step"])
    config = _in_folder(config, folder)
    if completed == rounds:
        summary: dict[str, Any] = manifest["summary"]
        folder.write_summary(summary)
        return Opening(config, folder, corpus, checkpoint, summary)
    for note in notes(manifest, config, threads):
        print(f"note: {note}", file=sys.stderr)
    return Opening(config, folder, corpus, checkpoint)


def _in_folder(config: Config, folder: RunFolder) -> Config:
    run = config.run.model_copy(update={"folder": str(folder.path)})
    return config.model_copy(update={"run": run})
