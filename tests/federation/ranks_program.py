# SPDX-License-Identifier: Apache-2.0
"""A rank of torchrun in a site of several: `torchrun ... ranks_program.py RUN_FOLDER PARALLEL`."""

import sys

import torch
from rank_pool import RANKS, DecoderTask, settings

from fomoe.federation.config import Config
from fomoe.federation.launch import train


def configuration(folder: str, **federation: object) -> Config:
    values = settings(rounds=2, **federation).to_dict()
    values["run"]["folder"] = folder
    return Config.from_dict(values)


if __name__ == "__main__":
    folder, parallel = sys.argv[1:]
    config = configuration(folder, ranks_per_site=RANKS, parallel=parallel, spread_experts=True)
    train(config, task=DecoderTask(torch.float64))
