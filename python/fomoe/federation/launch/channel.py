# SPDX-License-Identifier: Apache-2.0
"""What a site tells the coordinator: JSON messages, every byte of which is counted.

``step`` and ``round`` while training, over a pipe also ``finished``, or ``failed`` with a reason.
All values but timings depend on the settings alone, and timings have one width: so the bytes are
the same in every run of the same settings, on one machine or on many.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fomoe.federation.checkpoint import FileRecord
from fomoe.federation.ledger import SiteLedger

if TYPE_CHECKING:
    from multiprocessing import connection

__all__ = ["Channel", "NoChannel", "PipeChannel", "Reporter", "decode", "encode", "timing"]


def timing(value: float) -> str:
    """A measured value, at 15 characters whatever it is (from 1e-99 to 1e99)."""
    return f"{value:.9e}"


def encode(kind: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **fields}).encode()


def decode(message: bytes) -> dict[str, Any]:
    """The message, with timings as numbers again."""
    fields: dict[str, Any] = json.loads(message)
    if fields["kind"] == "round":
        timings = {name: float(value) for name, value in fields.pop("timings").items()}
        for name in [name for name in timings if name.startswith("peak_")]:
            fields["memory"][name] = int(timings.pop(name))
        fields |= timings
    return fields


class Channel(Protocol):
    """How messages and files of a site get to the coordinator."""

    files: Path
    """Where the site writes its files."""
    files_travel: bool
    """Whether the coordinator cannot see that folder, so that they cross the network."""

    def transmit(self, message: bytes) -> None: ...

    def end_round(self, records: Sequence[FileRecord]) -> None:
        """Hand over the files, if any; return when the site may go on."""
        ...


class PipeChannel:
    """To a coordinator that is another process of this machine."""

    files_travel = False

    def __init__(self, pipe: "connection.Connection[Any, Any]", files: Path) -> None:
        self.pipe = pipe
        self.files = files

    def transmit(self, message: bytes) -> None:
        self.pipe.send_bytes(message)

    def end_round(self, records: Sequence[FileRecord]) -> None:
        if records:
            self.wait_for_coordinator()

    def wait_for_coordinator(self) -> None:
        self.pipe.recv_bytes()


class NoChannel:
    """Of a rank that is not the leader of its site, and has nothing to report."""

    files = Path()
    files_travel = False

    def transmit(self, message: bytes) -> None:
        pass

    def end_round(self, records: Sequence[FileRecord]) -> None:
        pass


class Reporter:
    """Sends a site's reports; their bytes are traffic of class ``metrics``."""

    def __init__(self, channel: Channel, ledger: SiteLedger) -> None:
        self.channel = channel
        self.ledger = ledger

    def step(self, **fields: Any) -> None:
        message = encode("step", fields)
        self.ledger.sent("metrics", len(message))
        self.channel.transmit(message)

    def round(self, report: dict[str, Any], records: Sequence[FileRecord]) -> None:
        """Send a round's report with the bytes of that round, which this closes, and the files.

        The report counts in its own round, but for the counts in it, whose size depends on them.
        """
        report = report | {"files": [asdict(record) for record in records]}
        self.ledger.sent("metrics", len(encode("round", report)))
        self.channel.transmit(encode("round", report | {"bytes": self.ledger.close_round()}))
        self.channel.end_round(records)
