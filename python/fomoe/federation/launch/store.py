# SPDX-License-Identifier: Apache-2.0
"""torch's key-value stores: what processes tell each other outside of collectives."""

import datetime
import socket

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

__all__ = ["HOST", "PrefixStore", "Store", "TCPStore", "connect", "store_on_this_machine"]

HOST = "127.0.0.1"
_SECONDS = 60.0


def connect(host: str, port: int, prefix: str, seconds: float) -> Store:
    """A connection of its own to the store at an address: a blocked call blocks its connection."""
    timeout = datetime.timedelta(seconds=seconds)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(prefix, store)


def store_on_this_machine() -> TCPStore:
    """A store that listens on the loopback interface alone, as it asks nobody who they are."""
    listener = socket.create_server((HOST, 0))
    return TCPStore(
        HOST,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=_SECONDS),
        master_listen_fd=listener.detach(),
    )
