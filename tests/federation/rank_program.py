# SPDX-License-Identifier: Apache-2.0
"""A rank of torchrun that trains nano: `torchrun ... rank_program.py PLAN.json RUN_FOLDER [SITE]`.

The plan has "rounds", "accidents" (see faulty_task) and "settings" by section and key. The run
folder is relative to the current directory, so that ranks may each have their own.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faulty_task import CONFIG, AccidentTask
from nano_task import settings

from fomoe.federation.config import Config
from fomoe.federation.launch import train
from fomoe.federation.launch.membership import Seat, join
from fomoe.federation.launch.store import HOST, connect


def configuration(plan: dict, folder: Path) -> tuple[object, Config]:
    """nano's settings and the trainer's for a plan."""
    sites = plan["sites"]
    nano_config = dataclasses.replace(CONFIG, sites=sites, num_experts=sites, rounds=plan["rounds"])
    values = settings(nano_config, folder).to_dict()
    for key, value in plan["settings"].items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return nano_config, Config.from_dict(values)


def sums_over_groups(port: int, seat: Seat, sites: int, ranks_per_site: int, pipe: Any) -> None:
    """Join as this seat, and send the sums over the groups of everyone's rank."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    membership = join(connect(HOST, port, "test", 20.0), seat, sites, ranks_per_site)
    sums = {}
    for name in ("leaders", "inside"):
        group = getattr(membership, name)
        if group is not None:
            total = torch.tensor([10**membership.rank])
            dist.all_reduce(total, group=group)
            sums[name] = (dist.get_rank(group), int(total))
    pipe.send(sums)
    dist.barrier()


def main() -> None:
    path, folder, *site = sys.argv[1:]
    plan = json.loads(Path(path).read_text())
    nano_config, config = configuration(plan, Path(folder))
    task = AccidentTask(nano_config, Path(path).parent, plan["accidents"])
    train(config, task=task, site=int(site[0]) if site else None)


if __name__ == "__main__":
    main()
