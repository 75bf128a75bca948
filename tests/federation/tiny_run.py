# SPDX-License-Identifier: Apache-2.0
"""Runs of `fomoe train` that take a second: the model "tiny" on two sites."""

from pathlib import Path

SETTINGS = """
[model]
name = "tiny"
[federation]
strategy = "fomoe"
sites = 2
overlap = 1
local_steps = 2
rounds = 1
[training]
batch_size = 2
sequence_length = 32
[data]
max_bytes = 100000
validation_sequences = 4
"""


def write_settings(folder: Path) -> Path:
    path = folder / "config.toml"
    path.write_text(SETTINGS)
    return path


def arguments(folder: Path, *overrides: str) -> list[str]:
    """Of the command line, for a run in ``folder / "run"``."""
    config = write_settings(folder)
    return ["train", "--config", str(config), f"run.folder={folder}/run", *overrides]
