# SPDX-License-Identifier: Apache-2.0
"""Runs commands one stage after the other, each with a time limit, all before one deadline.

What every step gave is written to a JSON file as soon as it ends, so that nothing is lost when the
machine goes away.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TAIL_LENGTH = 4000  # characters of a log that go into the results


@dataclass(frozen=True, slots=True)
class Step:
    """A command that passes when it exits with 0."""

    name: str
    command: Sequence[str]
    seconds: float  # its limit
    needs: tuple[str, ...] = ()  # steps that must have passed before
    uses: tuple[str, ...] = ()  # steps that must have been run: what they left may do
    environment: dict[str, str] = field(default_factory=dict)  # added to the process's own
    stdout: Path | None = None  # keeps its results here; else they go to the log
    may_be_cut: bool = False  # what it gave before its limit counts: running into it is no failure


@dataclass(slots=True)
class Result:
    """How a step ended: passed, failed, "timed out", "cut" or "not run"."""

    step: str
    status: str
    seconds: float = 0.0
    note: str = ""  # one line: why, or the last line of the log
    exit_code: int | None = None
    command: str = ""
    tail: str = ""


class Runner:
    """Runs stages of steps until the deadline and keeps the results."""

    def __init__(self, folder: Path, seconds: float, about: dict[str, Any]) -> None:
        self.folder = folder
        self.results: list[Result] = []
        self._about = about
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Iterable[Sequence[Step]]) -> list[Result]:
        """Runs the steps of a stage side by side; a stage begins when the one before has ended."""
        for stage in stages:
            with ThreadPoolExecutor(max_workers=len(stage)) as pool:
                list(pool.map(self._run_step, stage))
        return self.results

    def failed(self) -> bool:
        """Whether a step that was run did not pass."""
        return any(result.status in ("failed", "timed out") for result in self.results)

    def _run_step(self, step: Step) -> None:
        passed = {result.step for result in self.results if result.status in ("passed", "cut")}
        missing = [name for name in step.needs if name not in passed]
        left = self._deadline - time.monotonic()
        if missing:
            result = Result(step.name, "not run", note=f"{missing[0]} did not pass")
        elif left <= 0:
            result = Result(step.name, "not run", note="the time was up")
        else:
            result = self._execute(step, min(step.seconds, left))
        with self._lock:
            self.results.append(result)
            self._write()
        print(f"{result.status:<9} {result.seconds:6.1f} s  {step.name}: {result.note}", flush=True)

    def _execute(self, step: Step, limit: float) -> Result:
        log_path = self.folder / f"{step.name.replace(' ', '_')}.log"
        begin = time.monotonic()
        result = Result(step.name, "failed", command=" ".join(step.command))
        with open(log_path, "wb") as log, open(step.stdout or os.devnull, "wb") as output:
            try:
                process = subprocess.Popen(
                    step.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output if step.stdout else log,
                    stderr=log if step.stdout else subprocess.STDOUT,
                    env=os.environ | step.environment,
                    start_new_session=True,  # so that what it starts ends with it
                )
            except OSError as error:
                result.note = f"{step.command[0]}: {error.strerror}"
                return result
            try:
                result.exit_code = process.wait(limit)
                result.status = "failed" if result.exit_code else "passed"
            except subprocess.TimeoutExpired:
                _end(process)
                result.status = "cut" if step.may_be_cut else "timed out"
            except BaseException:
                _end(process)
                raise
        result.seconds = round(time.monotonic() - begin, 1)
        text = log_path.read_text(errors="replace")
        result.tail = text[-TAIL_LENGTH:]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        result.note = lines[-1] if lines else ""
        if result.status in ("cut", "timed out"):
            result.note = f"stopped after {limit:.0f} s; {result.note}"
        return result

    def _write(self) -> None:
        steps = [asdict(result) for result in self.results]
        write_atomically(self.folder / "results.json", json.dumps(self._about | {"steps": steps}))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it started, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


def table(results: Sequence[Result]) -> str:
    """One line per step."""
    width = max((len(result.step) for result in results), default=0)
    lines = [
        f"{result.step:<{width}}  {result.status:<9}  {result.seconds:6.1f} s  {result.note[:100]}"
        for result in results
    ]
    return "\n".join(lines)
