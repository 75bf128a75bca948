# SPDX-License-Identifier: Apache-2.0
"""``fomoe train``: the coordinator of a federation whose sites are processes on this machine.

The coordinator is no site: it starts the sites, writes metrics and ledger, evaluates the assembled
model from the files the sites wrote, and makes them a checkpoint.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from fomoe.errors import SiteFailed, UserError
from fomoe.federation.checkpoint import (
    Checkpoint,
    FileRecord,
    commit,
    file_records,
    find_checkpoint,
    fresh_incomplete_folder,
    incomplete_folder,
    round_folder,
)
from fomoe.federation.config import Config
from fomoe.federation.evaluation import assembled_loss
from fomoe.federation.ledger import LedgerFile
from fomoe.federation.placement import Placement
from fomoe.federation.processes import SiteProcesses
from fomoe.federation.progress import ProgressLine
from fomoe.federation.site_process import SiteOrder
from fomoe.federation.summary import RunTotals, versions
from fomoe.federation.task import LanguageModelTask, Task
from fomoe.files import write_text

__all__ = ["train"]

# Settings a resumed run may change: they alter neither the model nor what a site has seen.
_FREE_ON_RESUME = {"run", "evaluation", "federation.rounds", "training.threads"}


def train(
    config: Config, *, resume: Path | None = None, task: Task | None = None
) -> dict[str, Any]:
    """Train as ``config`` says and return the summary, also written to the run folder.

    Parameters
    ----------
    config : Config
        From :func:`fomoe.federation.config.load_config`.
    resume : Path, optional
        A run folder: continue from its latest checkpoint, in that folder.
    task : Task, optional
        What to train; by default the language model of ``config.model`` on ``config.data``.

    Raises
    ------
    UserError
        A setting or file that does not fit; a full disk. Raised before training where possible.
    SiteFailed
        A site process died or failed; all others have been stopped.
    """
    task = task or LanguageModelTask(config)
    return _Coordinator(config, task, resume).run()


class _Coordinator:
    def __init__(self, config: Config, task: Task, resume: Path | None) -> None:
        federation = config.federation
        self.config = config
        self.task = task
        self.sites = federation.sites
        self.placement = Placement(
            task.num_layers, task.num_experts, federation.sites, federation.overlap
        )
        self.checkpoint = None if resume is None else Checkpoint(find_checkpoint(resume))
        self.folder = Path(config.run.folder) if resume is None else resume
        self.first_round = self._check_resume() if self.checkpoint else 0
        task.check()
        self._prepare_folder()
        self.totals = RunTotals(config, task, self.placement)
        if self.checkpoint is not None:
            self.totals.restore(self.checkpoint.manifest["totals"])

    def run(self) -> dict[str, Any]:
        federation = self.config.federation
        total_steps = federation.rounds * federation.local_steps
        first_step = self.first_round * federation.local_steps
        label = f"{federation.strategy}, {self.sites} sites"
        mode = "a" if self.checkpoint else "w"
        try:
            with (
                tempfile.TemporaryDirectory(prefix="fomoe-") as scratch,
                (self.folder / "metrics.jsonl").open(mode, encoding="utf-8") as self.metrics,
                LedgerFile(self.folder / "ledger.jsonl", mode) as self.ledger,
                ProgressLine(label, total_steps, first_step) as self.progress,
                SiteProcesses(self._orders(Path(scratch))) as self.processes,
            ):
                self._follow()
        finally:
            shutil.rmtree(incomplete_folder(self.folder), ignore_errors=True)
        summary = self.totals.summary()
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    # ---- messages ---------------------------------------------------------------------------

    def _follow(self) -> None:
        steps: dict[int, dict[int, dict[str, Any]]] = {}
        rounds: dict[int, dict[int, dict[str, Any]]] = {}
        for site, message in self.processes.messages():
            if message["kind"] == "step":
                self._collect(steps, message["step"], site, message, self._step_done)
            else:
                self._collect(rounds, message["round"], site, message, self._round_done)

    def _collect(
        self,
        pending: dict[int, dict[int, dict[str, Any]]],
        index: int,
        site: int,
        message: dict[str, Any],
        done: Any,
    ) -> None:
        pending.setdefault(index, {})[site] = message
        if len(pending[index]) == self.sites:
            by_site = pending.pop(index)
            done(index, [by_site[s] for s in range(self.sites)])

    def _step_done(self, step: int, reports: list[dict[str, Any]]) -> None:
        losses = [report["loss"] for report in reports]
        self._write("step", step=step, losses=losses, lr=reports[0]["lr"])
        self.progress.step(sum(losses) / len(losses))

    def _round_done(self, index: int, reports: list[dict[str, Any]]) -> None:
        for site, report in enumerate(reports):
            self.ledger.record(
                index,
                site,
                report["bytes"],
                report["tokens"],
                range(self.sites),
                report["digests"],
            )
        if len({report["digests"]["shared"] for report in reports}) > 1:
            raise SiteFailed(f"after round {index} the sites hold different shared tensors")
        self._write("round", **self.totals.add_round(index, reports))
        self.progress.round(self.totals)
        if reports[0]["evaluate"]:
            self._evaluate(index, reports)

    def _evaluate(self, index: int, reports: list[dict[str, Any]]) -> None:
        folder = incomplete_folder(self.folder)
        records = [FileRecord(**record) for report in reports for record in report["files"]]
        loss = assembled_loss(self.task, [folder / r.name for r in records if r.kind == "model"])
        site_losses = [report["validation_loss"] for report in reports]
        self.totals.add_evaluation(loss, site_losses)
        self._write("evaluation", round=index, loss=loss, site_losses=site_losses)
        last = index + 1 == self.config.federation.rounds
        if last and self.config.run.save:
            commit(folder, round_folder(self.folder, index + 1), self._manifest(index, records))
        fresh_incomplete_folder(self.folder)
        self.processes.reply()

    def _write(self, kind: str, **fields: Any) -> None:
        self.metrics.write(json.dumps({"kind": kind, **fields}) + "\n")
        self.metrics.flush()

    # ---- start and checkpoint ----------------------------------------------------------------

    def _orders(self, scratch: Path) -> list[SiteOrder]:
        return [
            SiteOrder(
                config=self.config,
                task=self.task,
                site=site,
                run=self.folder,
                rendezvous=scratch / "rendezvous",
                resume=None if self.checkpoint is None else self.checkpoint.folder,
                first_round=self.first_round,
            )
            for site in range(self.sites)
        ]

    def _prepare_folder(self) -> None:
        if self.checkpoint is None and any(self.folder.glob("checkpoints/round-*")):
            raise UserError(
                f"run.folder {self.folder} already holds a checkpoint: "
                f"continue with --resume {self.folder}, or choose another run.folder"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh_incomplete_folder(self.folder)
        except OSError as error:
            raise UserError(f"cannot write run.folder {self.folder}: {error.strerror}") from error

    def _check_resume(self) -> int:
        assert self.checkpoint is not None
        manifest = self.checkpoint.manifest
        then, now = _flatten(manifest["config"]), _flatten(self.config.to_dict())
        for key in sorted(then.keys() | now.keys()):
            free = key in _FREE_ON_RESUME or key.split(".")[0] in _FREE_ON_RESUME
            if not free and then.get(key) != now.get(key):
                raise UserError(
                    f"{key} is {now.get(key)!r}, but the run in {self.folder} was trained with "
                    f"{then.get(key)!r}"
                )
        completed = int(manifest["completed_rounds"])
        if completed >= self.config.federation.rounds:
            raise UserError(
                f"{self.folder} has completed {completed} rounds already: set federation.rounds "
                f"(now {self.config.federation.rounds}) higher to go on"
            )
        self.checkpoint.verify()
        return completed

    def _manifest(self, index: int, records: list[FileRecord]) -> dict[str, Any]:
        federation = self.config.federation
        steps = (index + 1) * federation.local_steps
        return {
            "config": self.config.to_dict(),
            "model": self.task.model_settings,
            "completed_rounds": index + 1,
            "step": steps,
            "placement": [
                [list(self.placement.holders(layer, e)) for e in range(self.placement.num_experts)]
                for layer in range(self.placement.num_layers)
            ],
            # All randomness is drawn from the seed and the position, so these are its whole state.
            "rng": {"seed": self.config.training.seed},
            "data_cursor": [steps * self.config.training.batch_size] * self.sites,
            "corpus_sha256": self.totals.corpus["corpus_sha256"],
            "totals": self.totals.state(),
            "threads_per_process": torch.get_num_threads(),
            "versions": versions(),
            "files": file_records(records),
        }


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        for key, value in values.items()
    }
