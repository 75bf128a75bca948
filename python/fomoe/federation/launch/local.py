# SPDX-License-Identifier: Apache-2.0
"""A federation on one machine: the coordinator is this process, every site one of its children."""

from pathlib import Path
from typing import Any

from fomoe.errors import SiteFailed
from fomoe.federation.config import Config
from fomoe.federation.launch.coordinator import Coordinator, where_to_go_on
from fomoe.federation.launch.device import check_device
from fomoe.federation.launch.heartbeat import Heartbeat, prepare
from fomoe.federation.launch.membership import SECONDS_IN_A_COLLECTIVE, threads_of_a_rank
from fomoe.federation.launch.opening import Opening, begin, check_placement, go_on
from fomoe.federation.launch.processes import SiteProcesses
from fomoe.federation.launch.site_process import SiteOrder
from fomoe.federation.launch.store import HOST, PrefixStore, connect, store_on_this_machine
from fomoe.federation.run_folder import RunFolder, run_to_resume
from fomoe.federation.task import Task

__all__ = ["train"]


def train(config: Config, task: Task, resume: Path | None) -> dict[str, Any]:
    """See :func:`fomoe.federation.launch.train`."""
    check_placement(config, task)
    for site in range(config.federation.sites):
        check_device(config.training.device_of(site))
    if resume is None:
        task.check()
        with RunFolder(Path(config.run.folder)) as folder:
            return _follow(begin(config, task, folder), task)
    with RunFolder(run_to_resume(resume)) as folder:
        threads = threads_of_a_rank(config, config.federation.sites)
        opening = go_on(config, task, folder, threads)
        if opening.summary is not None:
            return opening.summary
        return _follow(opening, task)


def _follow(opening: Opening, task: Task) -> dict[str, Any]:
    federation = opening.config.federation
    store = store_on_this_machine()
    beats = PrefixStore("beats", store)
    prepare(beats, federation.sites + 1)
    coordinator = Coordinator(opening, task, announce=lambda checkpoint: None)
    processes = SiteProcesses(_orders(opening, task, store.port))
    heartbeat = Heartbeat(
        connect(HOST, store.port, "beats", SECONDS_IN_A_COLLECTIVE),
        me=federation.sites,
        watched={site: f"site {site}" for site in range(federation.sites)},
        timeout=federation.timeout,
        store_name="the coordinator",
        lost=lambda loss: processes.lose(loss.sentence if loss else "a site is lost"),
    )
    try:
        with coordinator, processes, heartbeat:
            heartbeat.waiting("the sites' reports")
            for site, message in processes.messages():
                if message["kind"] == "round":
                    heartbeat.doing(f"the reports of round {message['round']}")
                if coordinator.receive(site, message):
                    processes.reply()
                heartbeat.waiting("the sites' reports")
    except SiteFailed as failure:
        hint = where_to_go_on(coordinator.last_checkpoint)
        raise SiteFailed(f"{failure.sentence}; {hint}", failure.trace) from failure
    return coordinator.finish()


def _orders(opening: Opening, task: Task, port: int) -> list[SiteOrder]:
    return [
        SiteOrder(
            config=opening.config,
            task=task,
            site=site,
            run=opening.folder.path,
            port=port,
            resume=None if opening.checkpoint is None else opening.checkpoint.folder,
            first_round=opening.first_round,
            corpus_sha256=opening.corpus_sha256,
        )
        for site in range(opening.config.federation.sites)
    ]
