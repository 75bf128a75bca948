# SPDX-License-Identifier: Apache-2.0
"""The line a person watches while a run trains."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fomoe.federation.summary import RunTotals
from fomoe.units import human_bytes

__all__ = ["ProgressLine"]

_LINES_WITHOUT_TERMINAL = 5


class ProgressLine:
    """Steps, loss, tokens/s, ghosts and bytes; a few plain lines where there is no terminal."""

    def __init__(self, label: str, total_steps: int, first_step: int) -> None:
        self.console = Console(stderr=True)
        self.label = label
        self.total_steps = total_steps
        self.completed = first_step
        self.loss = float("nan")
        self._next_line = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            label, total=total_steps, completed=first_step, loss=self.loss, state="starting sites"
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, loss: float) -> None:
        """All sites have finished a step; ``loss`` is their mean."""
        self.completed += 1
        self.loss = loss
        self._progress.update(self._task, completed=self.completed, loss=loss)

    def say(self, sentence: str) -> None:
        """A line of its own, above the one that moves."""
        self.console.print(sentence, soft_wrap=True, highlight=False)

    def round(self, totals: RunTotals) -> None:
        """A round is over."""
        state = (
            f"{totals.tokens_per_second:,.0f} tokens/s, ghosts {totals.ghost_share:.0%}, "
            f"{human_bytes(max(totals.exchange_bytes))} sent per site"
        )
        self._progress.update(self._task, state=state)
        share = self.completed / self.total_steps
        if not self.console.is_terminal and share >= self._next_line:
            self._next_line += 1 / _LINES_WITHOUT_TERMINAL
            step = f"step {self.completed}/{self.total_steps}"
            self.console.print(
                f"{self.label}: {step}, loss {self.loss:.3f}, {state}", soft_wrap=True
            )
