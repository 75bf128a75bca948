# SPDX-License-Identifier: Apache-2.0
"""What the switch of bench/wan counts, frame by frame; the links themselves need root."""

import importlib.util
import struct
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def links():
    path = Path(__file__).parents[2] / "bench" / "wan" / "links.py"
    spec = importlib.util.spec_from_file_location("wan_links", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["wan_links"] = module
    spec.loader.exec_module(module)
    return module


def frame(payload: int, sequence: int, port: int = 1000, padding: int = 0) -> bytes:
    """Ethernet, IPv4 and TCP with 12 bytes of options: 14 + 20 + 32 bytes of headers."""
    ethernet = bytes(12) + b"\x08\x00"
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 52 + payload, 0, 0, 64, 6, 0, b"aaaa", b"bbbb")
    tcp = struct.pack("!HHIIBBHHH12x", port, 2000, sequence % 2**32, 0, 8 << 4, 0, 0, 0, 0)
    return ethernet + ip + tcp + bytes(payload + padding)


def test_the_payload_is_what_the_headers_leave(links):
    traffic = links.Traffic()
    traffic.count(frame(100, 0))
    traffic.count(frame(0, 100, padding=6))  # an acknowledgement, filled up to a short frame
    traffic.count(bytes(12) + b"\x08\x06" + bytes(28))  # ARP
    assert traffic.frames == 3
    assert traffic.frame_bytes == 166 + 72 + 42
    assert traffic.payload_bytes == 100
    assert traffic.frames_without_payload == 2
    assert traffic.retransmitted_bytes == 0


def test_bytes_that_were_seen_before_count_as_sent_again(links):
    traffic = links.Traffic()
    start = 2**32 - 150  # sequence numbers wrap around
    for sequence, payload in ((0, 100), (100, 100), (100, 100), (150, 100)):
        traffic.count(frame(payload, start + sequence))
    traffic.count(frame(100, start, port=1001))  # another connection
    assert traffic.payload_bytes == 500
    assert traffic.retransmitted_bytes == 100 + 50
