# SPDX-License-Identifier: Apache-2.0
"""Starts the site processes, listens to them, and ends them all, however the run ends."""

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.context import ForkServerProcess
from typing import Any, Self

from fomoe.errors import SiteFailed, UserError
from fomoe.federation.launch.channel import decode
from fomoe.federation.launch.site_process import SiteOrder, run_site

__all__ = ["SiteProcesses"]

# torch imports the second at the first optimizer step, which takes every site seconds.
_PRELOADED = ["fomoe.federation.launch.site_process", "torch._dynamo"]
_SECONDS_FOR_THE_FIRST_CAUSE = 1.0
_SECONDS_TO_END = 30.0


class SiteProcesses:
    """All site processes of a run, as a context manager: entering starts them, leaving ends them.

    Processes come from a fork server that has loaded torch once, which makes starting a site a
    matter of milliseconds.
    """

    def __init__(self, orders: Sequence[SiteOrder]) -> None:
        self._orders = orders
        self._pipes: list[connection.Connection[Any, Any]] = []
        self.processes: list[ForkServerProcess] = []
        self._lost: str | None = None

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        try:
            with _no_interrupt():
                for order in self._orders:
                    pipe, site_end = context.Pipe()
                    process = context.Process(target=run_site, args=(order, site_end), daemon=True)
                    process.start()
                    site_end.close()
                    self._pipes.append(pipe)
                    self.processes.append(process)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()

    def lose(self, sentence: str) -> None:
        """End all sites because one is lost, as ``sentence`` says; for any thread to call.

        The thread that follows the messages finds them gone, whatever it was waiting for, and
        raises SiteFailed with this sentence.
        """
        self._lost = sentence
        for process in self.processes:
            process.kill()  # a process that is stopped, too

    def _kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def reply(self) -> None:
        """Let the sites, which wait for the coordinator, go on.

        Raises
        ------
        UserError, SiteFailed
            As :meth:`messages`, when one is gone.
        """
        for site, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(b"go on")
            except OSError:
                self._fail({site: self._receive(site)})

    def messages(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(site, message) in the order of arrival, until every site has finished.

        Raises
        ------
        UserError
            When a site met a mistake of the user's.
        SiteFailed
            When a site failed otherwise, its process died, or does not end when all have finished.
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
        for site, process in enumerate(self.processes):
            process.join(_SECONDS_TO_END)
            if process.exitcode != 0:
                raise SiteFailed(
                    f"site {site} finished its rounds, but its process did not end as it should "
                    f"({self._how_it_ended(site)})"
                )

    def _receive(self, site: int) -> dict[str, Any] | None:
        """The next message of a site, or None when its process is gone."""
        try:
            return decode(self._pipes[site].recv_bytes())
        except (EOFError, OSError):
            return None

    def _fail(self, failures: dict[int, dict[str, Any] | None]) -> None:
        """Raise for the site that failed first, not for a neighbour it took down with it."""
        if self._lost is not None:
            raise SiteFailed(self._lost)
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
        raise SiteFailed(f"site {echoes[0]} failed: {first['reason']}", first["trace"])

    def _how_it_ended(self, site: int) -> str:
        process = self.processes[site]
        process.join(timeout=5)
        code = process.exitcode
        if code is None:
            return "it is still running"
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold back Ctrl-C, which a terminal sends to the whole group, while processes start.

    They inherit the mask: the fork server for good, a site until it ignores the signal itself.
    """
    resource_tracker.ensure_running()  # starting it would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
