# SPDX-License-Identifier: Apache-2.0
"""Starts the site processes, listens to them, and ends them all, however the run ends."""

import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from typing import Any, Self

from fomoe.errors import SiteFailed, UserError
from fomoe.federation.site_process import SiteOrder, run_site

__all__ = ["SiteProcesses"]

# torch imports the second at the first optimizer step, which takes every site seconds.
_PRELOADED = ["fomoe.federation.site_process", "torch._dynamo"]
_SECONDS_FOR_THE_FIRST_CAUSE = 1.0


class SiteProcesses:
    """All site processes of a run, as a context manager: leaving it ends them.

    Processes come from a fork server that has loaded torch once, which makes starting a site a
    matter of milliseconds.
    """

    def __init__(self, orders: Sequence[SiteOrder]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipes: list[connection.Connection[Any, Any]] = []
        self.processes = []
        for order in orders:
            pipe, site_end = context.Pipe()
            process = context.Process(target=run_site, args=(order, site_end), daemon=True)
            process.start()
            site_end.close()
            self._pipes.append(pipe)
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def reply(self, sites: Sequence[int] | None = None) -> None:
        """Let sites that wait for the coordinator go on; all of them by default."""
        for site in range(len(self._pipes)) if sites is None else sites:
            self._pipes[site].send_bytes(b"go on")

    def messages(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(site, message) in the order of arrival, until every site has finished.

        Raises
        ------
        UserError
            When a site met a mistake of the user's.
        SiteFailed
            When a site failed otherwise or its process died.
        """
        running = set(range(len(self._pipes)))
        while running:
            sources = {self._pipes[site]: site for site in running}
            for ready in connection.wait(list(sources)):
                assert isinstance(ready, connection.Connection)
                site = sources[ready]
                message = self._receive(site)
                if message is None or message["kind"] == "failed":
                    self._fail({site: message})
                elif message["kind"] == "finished":
                    running.discard(site)
                else:
                    yield site, message
        self.reply()
        for process in self.processes:
            process.join()

    def _receive(self, site: int) -> dict[str, Any] | None:
        """The next message of a site, or None when its process is gone."""
        try:
            message: dict[str, Any] = json.loads(self._pipes[site].recv_bytes())
            return message
        except (EOFError, OSError):
            return None

    def _fail(self, failures: dict[int, dict[str, Any] | None]) -> None:
        """Raise for the site that failed first, not for a neighbour it took down with it."""
        deadline = time.monotonic() + _SECONDS_FOR_THE_FIRST_CAUSE
        while (left := deadline - time.monotonic()) > 0 and len(failures) < len(self._pipes):
            waiting = {pipe: site for site, pipe in enumerate(self._pipes) if site not in failures}
            for ready in connection.wait(list(waiting), timeout=left):
                assert isinstance(ready, connection.Connection)
                site = waiting[ready]
                message = self._receive(site)
                if message is None or message["kind"] == "failed":
                    failures[site] = message
        for message in failures.values():
            if message is not None and message["user_error"]:
                raise UserError(message["reason"])
        for site, message in failures.items():
            if message is None:
                raise SiteFailed(f"the process of site {site} died ({self._how_it_ended(site)})")
        # Errors of torch.distributed are mostly echoes of another site's failure.
        echoes = sorted(failures, key=lambda s: "distributed" in str(failures[s]).lower())
        first = failures[echoes[0]]
        assert first is not None
        raise SiteFailed(f"site {echoes[0]} failed: {first['reason']}\n{first['trace']}")

    def _how_it_ended(self, site: int) -> str:
        process = self.processes[site]
        process.join(timeout=5)
        code = process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"
