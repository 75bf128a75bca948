# SPDX-License-Identifier: Apache-2.0
"""Tasks whose sites fail, and a program that trains one: `faulty_task.py FOLDER [TIMEOUT]`."""

import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

import torch
from nano_task import NanoTask, nano, settings
from torch import Tensor, nn

from fomoe.federation.config import Config
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.task import LanguageModelTask
from fomoe.files import write_text

CONFIG = nano.Config(
    sites=3, overlap=1, rounds=2, local_steps=3, warmup=1, num_experts=3, top_k=1, dim=16,
    expert_dim=8,
)  # fmt: skip


class RecordingTask(NanoTask):
    """Writes down the process ids of the sites."""

    def __init__(self, config: Any, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def batch(self, site: int, step: int) -> Tensor:
        if torch.distributed.is_initialized() and step == 0:
            write_text(self.folder / f"{site}.pid", str(os.getpid()))
        return super().batch(site, step)

    def process_ids(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.folder.glob("*.pid"))]


class KilledTask(RecordingTask):
    """Site 2 is killed in its fifth step, as by the system when memory runs out."""

    def batch(self, site: int, step: int) -> Tensor:
        if site == 2 and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(site, step)


class KilledExpertParallelTask(LanguageModelTask):
    """Site 1 is killed, by default in its second step, between two exchanges of tokens."""

    def __init__(self, config: Config, step: int = 1) -> None:
        super().__init__(config)
        self.step = step

    def batch(self, site: int, step: int) -> Tensor:
        if site == 1 and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(site, step)


class RaisingTask(NanoTask):
    """Site 1 meets an error of the program, by default in its second step."""

    def __init__(self, config: Any, step: int = 1) -> None:
        super().__init__(config)
        self.step = step

    def batch(self, site: int, step: int) -> Tensor:
        if site == 1 and step == self.step:
            raise RuntimeError("planted")
        return super().batch(site, step)


class KilledWhileEvaluatingTask(RecordingTask):
    """Site 1 is killed, and is gone, when the coordinator evaluates."""

    def validation_loss(self, model: nn.Module) -> float:
        if not torch.distributed.is_initialized():
            process = int((self.folder / "1.pid").read_text())
            watch = os.pidfd_open(process)
            os.kill(process, signal.SIGKILL)
            select.select([watch], [], [])
            os.close(watch)
        return super().validation_loss(model)


class BadEndTask(NanoTask):
    """The process of site 1 ends with code 3 although its work is done."""

    def batch(self, site: int, step: int) -> Tensor:
        if site == 1 and step == 0 and torch.distributed.is_initialized():
            util.Finalize(None, os._exit, args=(3,), exitpriority=100)
        return super().batch(site, step)


class DriftingTask(NanoTask):
    """A tensor of site 1 changes after the meeting."""

    def __init__(self, config: Any, is_shared: bool) -> None:
        super().__init__(config)
        self.is_shared = is_shared

    def routing(self, model: nn.Module) -> list[dict[str, Any]]:
        if torch.distributed.get_rank() == 1:
            tensors = federated_tensors(model)
            next(t for t in tensors if t.on_every_site == self.is_shared).value.add_(1)
        return super().routing(model)


class LocalTask(NanoTask):
    """Holds what cannot travel to a site process."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.function: Callable[[], None] = lambda: None


class FullDiskTask(LanguageModelTask):
    """The sites cannot write files over 100 kB: the write fails as on a full disk."""

    def batch(self, site: int, step: int) -> Tensor:
        if torch.distributed.is_initialized():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return super().batch(site, step)


class ChangedTextTask(LanguageModelTask):
    """The text changes after the coordinator has read it and before the sites do."""

    def __init__(self, config: Config, text: Path) -> None:
        super().__init__(config)
        self.text = text

    def check(self) -> None:
        super().check()
        self.text.write_text(self.text.read_text().upper())


class AccidentTask(RecordingTask):
    """A signal hits a site in the middle of a step: (site, step, signal) for each accident.

    Every accident happens once, also when the run begins anew or goes on elsewhere.
    """

    def __init__(
        self, config: Any, folder: Path, accidents: Sequence[tuple[int, int, int]]
    ) -> None:
        super().__init__(config, folder)
        self.accidents = accidents

    def batch(self, site: int, step: int) -> Tensor:
        for number, (its_site, its_step, its_signal) in enumerate(self.accidents):
            happened = self.folder / f"accident-{number}"
            if (site, step) == (its_site, its_step) and not happened.exists():
                happened.touch()
                os.kill(os.getpid(), its_signal)
        return super().batch(site, step)


class HangingTask(NanoTask):
    """Site 1 stays for ever in its fifth step, while the others wait for it in the meeting."""

    def batch(self, site: int, step: int) -> Tensor:
        if site == 1 and step == 4:
            threading.Event().wait()
        return super().batch(site, step)


class EndlessTask(RecordingTask):
    """Says on standard output when every site is training."""

    def batch(self, site: int, step: int) -> Tensor:
        if step == 3 and site == 0 and torch.distributed.is_initialized():
            print("training", flush=True)
        return super().batch(site, step)


def main() -> None:
    from fomoe.federation.launch import train

    folder = Path(sys.argv[1])
    config = nano.Config(**{**CONFIG.__dict__, "rounds": 100_000})
    timeout = float(sys.argv[2]) if len(sys.argv) > 2 else 600.0
    train(settings(config, folder / "run", timeout=timeout), task=EndlessTask(config, folder))


if __name__ == "__main__":
    main()
