# SPDX-License-Identifier: Apache-2.0
"""A federation whose ranks torchrun has started, on one machine or on several.

The leader of site 0 does the coordinator's work, too: between rounds, with the reports that it
gathers. The run folder is on its machine. Where other machines do not see that folder, the files
of a checkpoint travel.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fomoe.federation.checkpoint import Checkpoint
from fomoe.federation.config import Config
from fomoe.federation.exchange import Bystander, GroupTransport, Transport
from fomoe.federation.launch.channel import NoChannel
from fomoe.federation.launch.coordinator import Coordinator
from fomoe.federation.launch.device import use_device
from fomoe.federation.launch.heartbeat import CHECKPOINT
from fomoe.federation.launch.membership import threads_of_a_rank
from fomoe.federation.launch.opening import Opening, check_placement, opened_in_an_attempt
from fomoe.federation.launch.rank import Rank
from fomoe.federation.launch.rounds import (
    WatchedTokenTransport,
    WatchedTransport,
    check_corpus,
    run_rounds,
)
from fomoe.federation.launch.traveling import GroupChannel, Travel, mark
from fomoe.federation.run_folder import run_folder_of
from fomoe.federation.site import Site
from fomoe.federation.site_ranks import OneRank, RankGroup, SiteRanks
from fomoe.federation.task import Task

__all__ = ["is_launched", "train"]


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def train(config: Config, task: Task, resume: Path | None, site: int | None) -> dict[str, Any]:
    """See :func:`fomoe.federation.launch.train`; on every rank of torchrun."""
    torch.set_num_threads(threads_of_a_rank(config, int(os.environ["LOCAL_WORLD_SIZE"])))
    with Rank(config, site) as rank:
        # The first optimizer step would import it, which takes seconds that are no step's.
        importlib.import_module("torch._dynamo")
        use_device(config.training.device_of(rank.membership.site), int(os.environ["LOCAL_RANK"]))
        if rank.membership.rank == 0:
            with opened_in_an_attempt(config, task, resume, rank.store_of_all_attempts) as opening:
                rank.store.set("summary", json.dumps(_lead(rank, opening, task)))
        elif rank.membership.leaders is not None:
            run = Path(config.run.folder) if resume is None else run_folder_of(resume)
            _take_part(rank, config, task, run)
        else:
            _help(rank, config, task)
        rank.heartbeat.waiting("the end of the run")
        summary: dict[str, Any] = json.loads(rank.store.get("summary"))
        dist.barrier()  # nobody hangs up while a neighbour still reads
    dist.destroy_process_group()
    return summary


def _lead(rank: Rank, opening: Opening, task: Task) -> dict[str, Any]:
    """The part of site 0's leader, with the coordinator's work."""
    run, checkpoint = opening.folder.path, opening.checkpoint
    plan = {
        "first_round": opening.first_round,
        "corpus_sha256": opening.corpus_sha256,
        "checkpoint": None if checkpoint is None else checkpoint.folder.name,
        "has_ended": opening.summary is not None,
    }
    with mark(run, rank.attempt):
        rank.store.set("plan", json.dumps(plan))
        if opening.summary is not None:
            return opening.summary
        travel = Travel.plan(rank.leaders, run, rank.attempt)
    if checkpoint is not None:
        rank.heartbeat.waiting("the checkpoint's way to the other sites")
        travel.send_checkpoint(checkpoint)
        rank.heartbeat.starting()
    coordinator = Coordinator(
        opening,
        task,
        announce=lambda path: rank.store.set(CHECKPOINT, path),
    )
    with coordinator, travel.outbox() as outbox:
        tokens = WatchedTokenTransport.between_sites(opening.config, rank.heartbeat)
        ranks = _ranks(rank, tokens)
        site = Site(opening.config, task, _transport(rank), checkpoint, ranks, tokens)
        channel = GroupChannel(travel, outbox, coordinator, rank.heartbeat)
        run_rounds(site, channel, rank.heartbeat, opening.first_round)
    return coordinator.finish()


def _take_part(rank: Rank, config: Config, task: Task, run: Path) -> None:
    """The part of any other leader."""
    check_placement(config, task)
    rank.heartbeat.waiting("the run folder")
    plan = json.loads(rank.store.get("plan"))
    if plan["has_ended"]:
        return
    travel = Travel.plan(rank.leaders, run, rank.attempt)
    with travel.outbox() as outbox:
        checkpoint = None
        if plan["checkpoint"] is not None:
            checkpoint = (
                travel.receive_checkpoint(outbox)
                if travel.is_away
                else Checkpoint(run / "checkpoints" / plan["checkpoint"])
            )
        rank.heartbeat.starting()
        check_corpus(task, rank.membership.site, plan["corpus_sha256"])
        tokens = WatchedTokenTransport.between_sites(config, rank.heartbeat)
        ranks = _ranks(rank, tokens)
        site = Site(config, task, _transport(rank), checkpoint, ranks, tokens)
        if checkpoint is not None and travel.is_away:
            travel.remove(checkpoint)
        channel = GroupChannel(travel, outbox, None, rank.heartbeat)
        run_rounds(site, channel, rank.heartbeat, plan["first_round"])


def _help(rank: Rank, config: Config, task: Task) -> None:
    """The part of a rank that is not the leader of its site."""
    check_placement(config, task)
    rank.heartbeat.waiting("the run folder")
    plan = json.loads(rank.store.get("plan"))
    if plan["has_ended"]:
        return
    rank.heartbeat.starting()
    check_corpus(task, rank.membership.site, plan["corpus_sha256"])
    tokens = WatchedTokenTransport.between_sites(config, rank.heartbeat)
    site = Site(config, task, _transport(rank), None, _ranks(rank, tokens), tokens)
    run_rounds(site, NoChannel(), rank.heartbeat, plan["first_round"])


def _transport(rank: Rank) -> Transport:
    membership = rank.membership
    if membership.leaders is None:
        return Bystander(membership.site, membership.sites)
    return WatchedTransport(GroupTransport(membership.leaders), rank.heartbeat)


def _ranks(rank: Rank, between_sites: WatchedTokenTransport | None) -> SiteRanks:
    inside = rank.membership.inside
    if inside is None:
        return OneRank()
    sharded = rank.config.federation.parallel == "fsdp"
    site, heartbeat = rank.membership.site, rank.heartbeat
    tokens = between_sites or WatchedTokenTransport.inside(rank.config, site, inside, heartbeat)
    return RankGroup(inside, sharded=sharded, tokens=tokens, waiting=heartbeat.waits)
