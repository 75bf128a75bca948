# SPDX-License-Identifier: Apache-2.0
"""Tasks whose sites fail, and a program that trains one: `python faulty_task.py FOLDER`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from nano_task import NanoTask, nano, settings
from torch import Tensor

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


class RaisingTask(RecordingTask):
    """Site 1 meets an error of the program in its second step."""

    def batch(self, site: int, step: int) -> Tensor:
        if site == 1 and step == 1:
            raise RuntimeError("planted")
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
    train(settings(config, folder / "run"), task=EndlessTask(config, folder))


if __name__ == "__main__":
    main()
