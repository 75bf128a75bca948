# SPDX-License-Identifier: Apache-2.0
"""Files that travel arrive whole, whatever their size, or are named; the store stays local."""

import hashlib
from collections import deque
from pathlib import Path

import pytest

from fomoe.errors import UserError
from fomoe.federation.checkpoint import FileRecord
from fomoe.federation.launch import file_transfer
from fomoe.federation.launch.file_transfer import receive_file, send_file
from fomoe.federation.launch.store import store_on_this_machine


@pytest.fixture
def wire(monkeypatch):
    """What is sent and not received yet; chunks are of four bytes."""
    chunks = deque()
    monkeypatch.setattr(file_transfer, "_CHUNK", 4)
    monkeypatch.setattr(
        file_transfer.dist, "send", lambda chunk, group, group_dst: chunks.append(chunk.clone())
    )
    monkeypatch.setattr(
        file_transfer.dist, "recv", lambda chunk, group, group_src: chunk.copy_(chunks.popleft())
    )
    return chunks


def record_of(path):
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return FileRecord(path.name, "model", 1, len(content), digest)


@pytest.mark.parametrize(("size", "chunks"), [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3)])
def test_a_file_of_any_size_arrives(size, chunks, wire, tmp_path):
    sent = tmp_path / "model-1.safetensors"
    sent.write_bytes(bytes(range(size)))
    send_file(sent, size, 0, None)
    assert len(wire) == chunks
    (tmp_path / "there").mkdir()
    receive_file(tmp_path / "there", record_of(sent), 1, None)
    assert (tmp_path / "there" / sent.name).read_bytes() == bytes(range(size))


def test_a_file_that_arrives_damaged_is_named(wire, tmp_path):
    sent = tmp_path / "model-1.safetensors"
    sent.write_bytes(b"content")
    record = record_of(sent)
    send_file(sent, 7, 0, None)
    wire[1][0] += 1
    with pytest.raises(
        UserError, match=r"model-1.safetensors came from site 1 with SHA-256 \w{12}"
    ):
        receive_file(tmp_path, record, 1, None)


def test_a_file_that_has_become_shorter_is_named(wire, tmp_path):
    sent = tmp_path / "model-1.safetensors"
    sent.write_bytes(b"cont")
    with pytest.raises(UserError, match=r"model-1.safetensors: it has less than 7 bytes"):
        send_file(sent, 7, 0, None)


def test_a_full_disk_on_the_way_is_named(wire, tmp_path):
    sent = tmp_path / "model-1.safetensors"
    sent.write_bytes(b"content")
    record = record_of(sent)
    send_file(sent, 7, 0, None)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / sent.name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"^cannot write .*model-1.safetensors: No space left"):
        receive_file(tmp_path / "there", record, 1, None)


def test_nobody_outside_of_this_machine_can_reach_its_store():
    store = store_on_this_machine()
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if int(port, 16) == store.port and line.split()[3] == "0A":
                listening.append(address)
    assert listening == ["0100007F"]
