# SPDX-License-Identifier: Apache-2.0
"""The coordinator: makes of the sites' reports metrics, ledger, evaluations and checkpoints.

It is no site. Reports reach it by :meth:`Coordinator.receive`, the sites' files by a folder.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from fomoe.federation.checkpoint import (
    FileRecord,
    Manifest,
    commit,
    fresh_incomplete_folder,
    incomplete_folder,
    remove_incomplete,
    remove_older,
    round_folder,
)
from fomoe.federation.evaluation import assembled_loss
from fomoe.federation.launch.opening import Opening
from fomoe.federation.ledger import check_agreement, round_lines
from fomoe.federation.placement import Placement, placement_of_round
from fomoe.federation.progress import ProgressLine
from fomoe.federation.summary import RunTotals, versions
from fomoe.federation.task import Task
from fomoe.files import JsonLines

__all__ = ["Coordinator", "where_to_go_on"]

_Report = dict[str, Any]


def where_to_go_on(checkpoint: str) -> str:
    """The end of a sentence about a run that failed; ``checkpoint`` is the last one, or empty."""
    if not checkpoint:
        return "there is no checkpoint yet"
    return (
        f"the last complete checkpoint is {checkpoint}: "
        f"continue with fomoe train --config ... --resume {Path(checkpoint).parents[1]}"
    )


class Coordinator:
    """Follows a run, as a context manager that has its files open.

    Parameters
    ----------
    opening
        The run folder, made ready.
    task
        What is trained.
    announce
        Called with the path of every checkpoint that is complete.
    """

    def __init__(
        self,
        opening: Opening,
        task: Task,
        announce: Callable[[str], None],
    ) -> None:
        self.config = opening.config
        self.folder = opening.folder
        self.task = task
        self.sites = opening.config.federation.sites
        self.announce = announce
        self.first_round = opening.first_round
        self.last_checkpoint = ""
        self.totals = RunTotals(self.config, task)
        if opening.checkpoint is not None:
            self.last_checkpoint = str(opening.checkpoint.folder)
            self.totals.restore(opening.checkpoint.manifest["totals"])
        self._anew = opening.checkpoint is None
        self._open = ExitStack()
        self._steps: dict[int, dict[int, _Report]] = {}
        self._rounds: dict[int, dict[int, _Report]] = {}

    def __enter__(self) -> Self:
        federation = self.config.federation
        total_steps = federation.rounds * federation.local_steps
        first_step = self.first_round * federation.local_steps
        label = f"{federation.strategy}, {self.sites} sites"
        fresh_incomplete_folder(self.folder.path)
        with self._open as opened:
            opened.callback(remove_incomplete, self.folder.path)
            self.metrics = opened.enter_context(JsonLines(self.folder.metrics, anew=self._anew))
            self.ledger = opened.enter_context(JsonLines(self.folder.ledger, anew=self._anew))
            self.progress = opened.enter_context(ProgressLine(label, total_steps, first_step))
            self._open = opened.pop_all()
        self.announce(self.last_checkpoint)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def finish(self) -> dict[str, Any]:
        """The summary of the run, all of whose rounds are over; it is written, too."""
        summary = self.totals.summary()
        self.folder.write_summary(summary)
        return summary

    # ---- reports ------------------------------------------------------------------------------

    def receive(self, site: int, message: _Report) -> bool:
        """Take a report, and act when it is the last one of its step or round.

        Returns
        -------
        bool
            Whether a round is over in which the sites wrote files, which have been dealt with.
        """
        pending = self._steps if message["kind"] == "step" else self._rounds
        index = message[message["kind"]]
        reports = pending.setdefault(index, {})
        reports[site] = message
        if len(reports) < self.sites:
            return False
        del pending[index]
        by_site = [reports[s] for s in range(self.sites)]
        if message["kind"] == "step":
            self._step_done(index, by_site)
            return False
        self._round_done(index, by_site)
        return bool(message["files"])

    def _step_done(self, step: int, reports: list[_Report]) -> None:
        losses = [report["loss"] for report in reports]
        finite = [loss for loss in losses if math.isfinite(loss)]
        known = [loss if math.isfinite(loss) else None for loss in losses]  # JSON knows no NaN
        self._write("step", step=step, losses=known, lr=reports[0]["lr"])
        self.progress.step(sum(finite) / len(finite) if finite else math.nan)

    def _round_done(self, index: int, reports: list[_Report]) -> None:
        for line in round_lines(index, reports, self._placement(index)):
            self.ledger.write(line)
        check_agreement(index, [report["digests"] for report in reports])
        rejected = reports[0]["rejected"]
        self._write("round", **self.totals.add_round(index, reports), rejected=rejected)
        for site in rejected:
            self.progress.say(
                f"round {index}: site {site} was left out of the mean, "
                "because its contribution or its loss was not finite"
            )
        for finding in self.totals.new_findings:
            self._write("warning", **finding.line())
            if self.totals.routing_health.is_first_of_its_kind(finding):
                self.progress.say(f"warning: round {finding.round}: {finding.sentence}")
        self.progress.round(self.totals)
        if not reports[0]["files"]:
            return
        records = [FileRecord(**record) for report in reports for record in report["files"]]
        if reports[0]["evaluate"]:
            self._evaluate(index, reports, records)
        else:
            self.totals.no_evaluation()
        if reports[0]["checkpoint"]:
            self._commit(index, reports, records)
        fresh_incomplete_folder(self.folder.path)

    def _evaluate(self, index: int, reports: list[_Report], records: list[FileRecord]) -> None:
        folder = incomplete_folder(self.folder.path)
        loss = assembled_loss(self.task, [folder / r.name for r in records if r.kind == "model"])
        site_losses = [report["validation_loss"] for report in reports]
        self.totals.add_evaluation(loss, site_losses)
        self._write("evaluation", round=index, loss=loss, site_losses=site_losses)

    def _commit(self, index: int, reports: list[_Report], records: list[FileRecord]) -> None:
        self.metrics.sync()
        self.ledger.sync()
        final = round_folder(self.folder.path, index + 1)
        threads = [report["threads"] for report in reports]
        cursors = [report["data_cursor"] for report in reports]
        manifest = self._manifest(index, records, threads, cursors)
        commit(incomplete_folder(self.folder.path), final, manifest)
        self.last_checkpoint = str(final)
        self.announce(self.last_checkpoint)
        remove_older(self.folder.path, self.config.run.keep_checkpoints)

    def _write(self, kind: str, **fields: Any) -> None:
        self.metrics.write({"kind": kind, **fields})

    def _placement(self, index: int) -> Placement:
        """Where the experts are during a round."""
        task = self.task
        return placement_of_round(self.config, task.num_layers, task.num_experts, index)

    def _manifest(
        self,
        index: int,
        records: list[FileRecord],
        threads: list[int],
        data_cursors: list[dict[str, Any]],
    ) -> Manifest:
        steps = (index + 1) * self.config.federation.local_steps
        return Manifest(
            config=self.config.to_dict(),
            model=self.task.model_settings,
            completed_rounds=index + 1,
            step=steps,
            placement=[[list(h) for h in layer] for layer in self._placement(index).table],
            # All randomness is drawn from the seed and the position, so these are its whole state.
            rng={"seed": self.config.training.seed},
            data_cursor=data_cursors,
            corpus_sha256=self.totals.corpus["corpus_sha256"],
            totals=self.totals.state(),
            summary=self.totals.summary(),
            threads_per_site=threads,
            versions=versions(),
            files=sorted(records, key=lambda record: record.name),
        )
