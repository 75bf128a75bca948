# SPDX-License-Identifier: Apache-2.0
"""``fomoe train``: the coordinator of a federation whose sites are processes on this machine.

The coordinator is no site: it starts the sites, writes metrics and ledger, evaluates the assembled
model from the files the sites wrote, and makes them a checkpoint.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fomoe.errors import UserError
from fomoe.federation.checkpoint import (
    Checkpoint,
    FileRecord,
    Manifest,
    commit,
    find_checkpoint,
    fresh_incomplete_folder,
    incomplete_folder,
    round_folder,
)
from fomoe.federation.config import Config
from fomoe.federation.evaluation import assembled_loss
from fomoe.federation.ledger import check_agreement, round_lines
from fomoe.federation.placement import Placement
from fomoe.federation.processes import SiteProcesses
from fomoe.federation.progress import ProgressLine
from fomoe.federation.resume import check_corpus, check_settings, notes
from fomoe.federation.run_folder import RunFolder, run_to_resume
from fomoe.federation.site_process import SiteOrder
from fomoe.federation.summary import RunTotals, corpus_sha256, versions
from fomoe.federation.task import LanguageModelTask, Task
from fomoe.files import JsonLines, cannot

__all__ = ["train"]

_Report = dict[str, Any]


def train(
    config: Config, *, resume: Path | None = None, task: Task | None = None
) -> dict[str, Any]:
    """Train as ``config`` says and return the summary, also written to the run folder.

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

    Raises
    ------
    UserError
        A setting or file that does not fit; a full disk. Raised before training where possible.
    SiteFailed
        A site process died or failed; all others have been stopped.
    """
    task = task or LanguageModelTask(config)
    federation = config.federation
    placement = Placement(task.num_layers, task.num_experts, federation.sites, federation.overlap)
    if resume is None:
        task.check()
        with RunFolder(Path(config.run.folder)) as folder:
            folder.begin()
            return _Coordinator(config, task, placement, folder, None).run()
    with RunFolder(run_to_resume(resume)) as folder:
        return _resume(config, task, placement, folder)


def _resume(config: Config, task: Task, placement: Placement, folder: RunFolder) -> dict[str, Any]:
    checkpoint = Checkpoint(find_checkpoint(folder.path))
    manifest = checkpoint.manifest
    check_settings(manifest, config, folder.path)
    check_corpus(manifest, corpus_sha256(task), folder.path)
    checkpoint.verify()
    task.check()
    completed, rounds = manifest["completed_rounds"], config.federation.rounds
    if completed > rounds or (completed == rounds and folder.summary.exists()):
        raise UserError(
            f"{folder.path} has completed {completed} rounds already: set federation.rounds "
            f"(now {rounds}) higher to go on"
        )
    folder.cut_back(completed, manifest["step"])
    if completed == rounds:
        summary: dict[str, Any] = manifest["summary"]
        folder.write_summary(summary)
        return summary
    for note in notes(manifest, config):
        print(f"note: {note}", file=sys.stderr)
    return _Coordinator(config, task, placement, folder, checkpoint).run()


class _Coordinator:
    def __init__(
        self,
        config: Config,
        task: Task,
        placement: Placement,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
    ) -> None:
        run = config.run.model_copy(update={"folder": str(folder.path)})
        self.config = config.model_copy(update={"run": run})
        self.task = task
        self.placement = placement
        self.folder = folder
        self.checkpoint = checkpoint
        self.sites = placement.sites
        self.totals = RunTotals(self.config, task, placement)
        self.first_round = 0
        if checkpoint is not None:
            self.first_round = checkpoint.manifest["completed_rounds"]
            self.totals.restore(checkpoint.manifest["totals"])

    def run(self) -> dict[str, Any]:
        federation = self.config.federation
        total_steps = federation.rounds * federation.local_steps
        first_step = self.first_round * federation.local_steps
        label = f"{federation.strategy}, {self.sites} sites"
        anew = self.checkpoint is None
        fresh_incomplete_folder(self.folder.path)
        try:
            with (
                _scratch_folder() as scratch,
                JsonLines(self.folder.metrics, anew=anew) as self.metrics,
                JsonLines(self.folder.ledger, anew=anew) as self.ledger,
                ProgressLine(label, total_steps, first_step) as self.progress,
                SiteProcesses(self._orders(scratch)) as self.processes,
            ):
                self._follow()
        finally:
            shutil.rmtree(incomplete_folder(self.folder.path), ignore_errors=True)
        summary = self.totals.summary()
        self.folder.write_summary(summary)
        return summary

    # ---- messages ---------------------------------------------------------------------------

    def _follow(self) -> None:
        steps: dict[int, dict[int, _Report]] = {}
        rounds: dict[int, dict[int, _Report]] = {}
        for site, message in self.processes.messages():
            if message["kind"] == "step":
                self._collect(steps, message["step"], site, message, self._step_done)
            else:
                self._collect(rounds, message["round"], site, message, self._round_done)

    def _collect(
        self,
        pending: dict[int, dict[int, _Report]],
        index: int,
        site: int,
        message: _Report,
        done: Callable[[int, list[_Report]], None],
    ) -> None:
        pending.setdefault(index, {})[site] = message
        if len(pending[index]) == self.sites:
            by_site = pending.pop(index)
            done(index, [by_site[s] for s in range(self.sites)])

    def _step_done(self, step: int, reports: list[_Report]) -> None:
        losses = [report["loss"] for report in reports]
        self._write("step", step=step, losses=losses, lr=reports[0]["lr"])
        self.progress.step(sum(losses) / len(losses))

    def _round_done(self, index: int, reports: list[_Report]) -> None:
        for line in round_lines(index, reports, self.placement):
            self.ledger.write(line)
        check_agreement(index, [report["digests"] for report in reports])
        self._write("round", **self.totals.add_round(index, reports))
        for finding in self.totals.new_findings:
            self._write("warning", **finding.line())
            if self.totals.routing_health.is_first_of_its_kind(finding):
                self.progress.say(f"warning: round {finding.round}: {finding.sentence}")
        self.progress.round(self.totals)
        if reports[0]["evaluate"]:
            self._evaluate(index, reports)

    def _evaluate(self, index: int, reports: list[_Report]) -> None:
        folder = incomplete_folder(self.folder.path)
        records = [FileRecord(**record) for report in reports for record in report["files"]]
        loss = assembled_loss(self.task, [folder / r.name for r in records if r.kind == "model"])
        site_losses = [report["validation_loss"] for report in reports]
        self.totals.add_evaluation(loss, site_losses)
        self._write("evaluation", round=index, loss=loss, site_losses=site_losses)
        last = index + 1 == self.config.federation.rounds
        if last and self.config.run.save:
            self.metrics.sync()
            self.ledger.sync()
            threads = [report["threads"] for report in reports]
            final = round_folder(self.folder.path, index + 1)
            commit(folder, final, self._manifest(index, records, threads))
        fresh_incomplete_folder(self.folder.path)
        self.processes.reply()

    def _write(self, kind: str, **fields: Any) -> None:
        self.metrics.write({"kind": kind, **fields})

    # ---- start and checkpoint ----------------------------------------------------------------

    def _orders(self, scratch: Path) -> list[SiteOrder]:
        return [
            SiteOrder(
                config=self.config,
                task=self.task,
                site=site,
                run=self.folder.path,
                rendezvous=scratch / "rendezvous",
                resume=None if self.checkpoint is None else self.checkpoint.folder,
                first_round=self.first_round,
                corpus_sha256=self.totals.corpus["corpus_sha256"],
            )
            for site in range(self.sites)
        ]

    def _manifest(self, index: int, records: list[FileRecord], threads: list[int]) -> Manifest:
        steps = (index + 1) * self.config.federation.local_steps
        return Manifest(
            config=self.config.to_dict(),
            model=self.task.model_settings,
            completed_rounds=index + 1,
            step=steps,
            placement=[
                [list(self.placement.holders(layer, e)) for e in range(self.placement.num_experts)]
                for layer in range(self.placement.num_layers)
            ],
            # All randomness is drawn from the seed and the position, so these are its whole state.
            rng={"seed": self.config.training.seed},
            data_cursor=[steps * self.config.training.batch_size] * self.sites,
            corpus_sha256=self.totals.corpus["corpus_sha256"],
            totals=self.totals.state(),
            summary=self.totals.summary(),
            threads_per_site=threads,
            versions=versions(),
            files=sorted(records, key=lambda record: record.name),
        )


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for the sites' rendezvous, gone afterwards."""
    with cannot(f"use the temporary folder {tempfile.gettempdir()}"):
        folder = tempfile.TemporaryDirectory(prefix="fomoe-", ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)
