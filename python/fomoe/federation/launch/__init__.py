# SPDX-License-Identifier: Apache-2.0
"""Where a federation runs: as processes of this machine, or as the ranks of ``torchrun``."""

from pathlib import Path
from typing import Any

from fomoe.errors import UserError
from fomoe.federation.config import Config
from fomoe.federation.launch import local, torchrun
from fomoe.federation.task import LanguageModelTask, Task

__all__ = ["train"]


def train(
    config: Config,
    *,
    resume: Path | None = None,
    task: Task | None = None,
    site: int | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says and return the summary, also written to the run folder.

    Started by ``torchrun``, this is one rank of the federation: the first rank of site 0 returns
    the summary, all others None.

    Parameters
    ----------
    config : Config
        From :func:`fomoe.federation.config.load_config`.
    resume : Path, optional
        A run folder, or the latest checkpoint in one: continue from there, in that run folder
        whatever ``config.run.folder`` says. A run that has completed all its rounds but could not
        write its summary gets it now.
    task : Task, optional
        What to train; by default the language model of ``config.model`` on ``config.data``.
    site : int, optional
        The site of this rank of torchrun; by default it follows from the number of the machine or
        of the rank (see :mod:`fomoe.federation.launch.membership`).

    Raises
    ------
    UserError
        A setting or file that does not fit; a full disk. Raised before training where possible.
    SiteFailed
        A site died, failed or hung; all others have been stopped.
    """
    task = task or LanguageModelTask(config)
    if torchrun.is_launched():
        return torchrun.train(config, task, resume, site)
    if site is not None:
        raise UserError(
            f"--site {site} is for a rank started by torchrun, and this process is none: "
            "without torchrun one command starts all sites"
        )
    if config.federation.ranks_per_site > 1:
        raise UserError(
            f"federation.ranks_per_site = {config.federation.ranks_per_site} needs torchrun: "
            f"torchrun --nproc-per-node=... -m fomoe train --config ..."
        )
    return local.train(config, task, resume)
