# SPDX-License-Identifier: Apache-2.0
"""Before the first round: the run folder made ready to begin in, or to go on in."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fomoe.errors import UserError
from fomoe.federation.checkpoint import (
    Checkpoint,
    find_checkpoint,
    remove_incomplete,
    remove_older,
)
from fomoe.federation.config import Config
from fomoe.federation.launch.store import Store
from fomoe.federation.placement import placement_of_round
from fomoe.federation.resume import check_corpus, check_settings, notes
from fomoe.federation.run_folder import RunFolder, run_folder_of, run_to_resume
from fomoe.federation.summary import corpus_sha256
from fomoe.federation.task import Task

__all__ = ["Opening", "begin", "check_placement", "go_on", "opened_in_an_attempt"]

_OPENED = "opened"


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
        remove_incomplete(folder.path)
        remove_older(folder.path, config.run.keep_checkpoints)
        summary: dict[str, Any] = manifest["summary"]
        folder.write_summary(summary)
        return Opening(config, folder, corpus, checkpoint, summary)
    for note in notes(manifest, config, threads):
        print(f"note: {note}", file=sys.stderr)
    return Opening(config, folder, corpus, checkpoint)


@contextmanager
def opened_in_an_attempt(
    config: Config, task: Task, resume: Path | None, attempts: Store
) -> Iterator[Opening]:
    """The run folder, locked and open, in one of the attempts of a launcher that starts anew.

    A later attempt goes on where the run was, from its last checkpoint, or begins anew when there
    is none. ``attempts`` is a store that stays over the attempts; ``resume`` is as in
    :func:`fomoe.federation.launch.train`.

    Raises
    ------
    UserError
        As :func:`begin` and :func:`go_on`; in every attempt, until one has opened the folder.
    """
    restarted = attempts.check([_OPENED])
    path = Path(config.run.folder) if resume is None else run_folder_of(resume)
    if resume is None:
        task.check()
    elif not restarted:
        run_to_resume(resume)
    with RunFolder(path) as folder:
        if resume is not None or (restarted and _has_checkpoint(path)):
            threads = torch.get_num_threads()
            opening = go_on(config, task, folder, threads, restarted=restarted)
        else:
            opening = begin(config, task, folder)
        attempts.set(_OPENED, "")
        yield opening


def _has_checkpoint(run: Path) -> bool:
    try:
        run_to_resume(run)
    except UserError:
        return False
    return True


def _in_folder(config: Config, folder: RunFolder) -> Config:
    run = config.run.model_copy(update={"folder": str(folder.path)})
    return config.model_copy(update={"run": run})
