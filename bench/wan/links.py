# SPDX-License-Identifier: Apache-2.0
"""Machines joined by slow links: network namespaces, and a switch in user space. Needs root.

Every machine is a namespace with one interface, a TAP device. What it sends is held to the rate of
its link by the kernel (tbf), which also holds back the sender, as a network card does. The other
ends of the TAP devices are files of one switch process: it delays every frame, holds what goes down
each link to the rate, too, with a queue that drops what does not fit, and counts. netem would do
the same, but is not in every kernel, and counts no bytes.

The switch reads the headers of every frame, so the bytes of TCP's payload are counted, not
estimated, and so are those it has seen before (retransmissions).
"""

import fcntl
import ipaddress
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_FRAME = 1514
_READS = 64
"""Frames taken from one machine before it is another's turn."""
_NETWORK = ipaddress.ip_network("10.77.0.0/24")
_IPV4, _TCP = 0x0800, 6


@dataclass(frozen=True)
class Link:
    """Of every machine, both ways: bits per second, seconds on the way, and the queue in bytes."""

    rate: float = 100e6
    delay: float = 0.020
    queue: int = 1000 * _FRAME  # netem's 1000 packets


@dataclass
class Traffic:
    """What one machine has sent: frames as they are on the link, and the payload of TCP in them."""

    frames: int = 0
    frame_bytes: int = 0
    payload_bytes: int = 0
    retransmitted_bytes: int = 0
    frames_without_payload: int = 0
    dropped_frames: int = 0
    ends: dict[bytes, int] = field(default_factory=dict, repr=False)
    """By connection, the sequence number after the last byte seen."""

    def count(self, frame: bytes) -> None:
        self.frames += 1
        self.frame_bytes += len(frame)
        payload = 0
        if frame[12:14] == _IPV4.to_bytes(2, "big") and frame[23] == _TCP:
            ip_header = 4 * (frame[14] & 15)
            tcp = 14 + ip_header
            total, sequence = struct.unpack_from("!H", frame, 16)[0], frame[tcp + 4 : tcp + 8]
            payload = total - ip_header - 4 * (frame[tcp + 12] >> 4)
            if payload:
                self._count_again(frame[26:34] + frame[tcp : tcp + 4], sequence, payload)
        self.payload_bytes += payload
        self.frames_without_payload += payload == 0

    def _count_again(self, connection: bytes, sequence: bytes, payload: int) -> None:
        begin = int.from_bytes(sequence, "big")
        end = self.ends.get(connection, begin)
        behind = (end - begin) % 2**32
        if behind >= 2**31:  # there is a gap: what was lost comes again later, out of order
            behind = 0
        self.retransmitted_bytes += min(behind, payload)
        if behind < payload:
            self.ends[connection] = (begin + payload) % 2**32


class Machines:
    """The namespaces and the switch between them; see :func:`machines`."""

    def __init__(self, names: Sequence[str], control: Connection) -> None:
        self.names = names
        self._control = control

    def address(self, machine: int) -> str:
        return str(_NETWORK[machine + 1])

    def interface(self, machine: int) -> str:
        return _interface(self.names[machine])

    def command(self, machine: int, *arguments: str) -> list[str]:
        """What runs a command on a machine."""
        return ["ip", "netns", "exec", self.names[machine], *arguments]

    def traffic(self) -> list[dict[str, int]]:
        """What every machine has sent since the beginning."""
        self._control.send("traffic")
        result: list[dict[str, int]] = self._control.recv()
        return result


@contextmanager
def machines(count: int, link: Link) -> Iterator[Machines]:
    """That many machines, all gone at the end, whatever happens."""
    names = [f"fomoe-wan-{os.getpid()}-{machine}" for machine in range(count)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    switch = context.Process(target=_switch, args=(names, link, theirs), daemon=True)
    with ExitStack() as stack:
        stack.callback(ours.close)  # ends the switch, and with it the interfaces
        switch.start()
        theirs.close()
        stack.callback(switch.join, 10)
        if ours.recv() != "ready":
            raise RuntimeError("the switch did not start")
        for machine, name in enumerate(names):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
            _set_up(machine, names, link)
        yield Machines(names, ours)


def _set_up(machine: int, names: Sequence[str], link: Link) -> None:
    name = names[machine]
    interface = _interface(name)
    _run("ip", "link", "set", interface, "netns", name)
    _run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    address = f"{_NETWORK[machine + 1]}/{_NETWORK.prefixlen}"
    _run("ip", "-n", name, "address", "add", address, "dev", interface)
    _run("ip", "-n", name, "link", "set", interface, "address", _mac(machine), "mtu", "1500")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "link", "set", interface, "up")
    for other in range(len(names)):
        if other != machine:
            _run(
                "ip", "-n", name, "neighbour", "add", str(_NETWORK[other + 1]), "lladdr",
                _mac(other), "dev", interface, "nud", "permanent",
            )  # fmt: skip
    _run(
        "tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", "rate",
        f"{link.rate:.0f}bit", "burst", "16kb", "limit", str(link.queue),
    )  # fmt: skip


def _interface(name: str) -> str:
    _, _, process, machine = name.split("-")
    return f"fw{process}s{machine}"  # at most 15 characters


def _mac(machine: int) -> str:
    return f"02:00:00:00:00:{machine:02x}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


# ---- the switch -------------------------------------------------------------------------------


def _switch(names: Sequence[str], link: Link, control: Connection) -> None:
    """Carry frames between the TAP devices until the other end of ``control`` is closed."""
    taps = [_open_tap(_interface(name)) for name in names]
    control.send("ready")
    traffic = [Traffic() for _ in taps]
    waiting: list[deque[tuple[float, bytes]]] = [deque() for _ in taps]
    free = [0.0 for _ in taps]
    """When the link down to a machine has carried what it was given."""
    while True:
        due = min((queue[0][0] for queue in waiting if queue), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        readable, _, _ = select.select([*taps, control], [], [], timeout)
        now = time.monotonic()
        for machine, queue in enumerate(waiting):
            while queue and queue[0][0] <= now:
                _write(taps[machine], queue.popleft()[1])
        for machine, tap in enumerate(taps):
            if tap not in readable:
                continue
            for frame in _read(tap):
                traffic[machine].count(frame)
                target = frame[5]
                if frame[0] & 1 or target >= len(taps):
                    continue  # a broadcast: all addresses are known
                begin = max(now, free[target])
                if begin - now > 8 * link.queue / link.rate:
                    traffic[machine].dropped_frames += 1
                    continue
                free[target] = begin + 8 * len(frame) / link.rate
                waiting[target].append((free[target] + link.delay, frame))
        if control in readable and not _answer(control, traffic):
            return


def _answer(control: Connection, traffic: Sequence[Traffic]) -> bool:
    try:
        control.recv()
    except EOFError:
        return False
    counts = [asdict(each) for each in traffic]
    for count in counts:
        del count["ends"]
    control.send(counts)
    return True


def _open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
    fcntl.ioctl(tap, _TUNSETIFF, request)
    return tap


def _read(tap: int) -> Iterator[bytes]:
    for _ in range(_READS):
        try:
            yield os.read(tap, 2048)
        except OSError:  # nothing more, or the interface is still down
            return


def _write(tap: int, frame: bytes) -> Any:
    try:
        return os.write(tap, frame)
    except OSError:  # the machine is gone
        return None
