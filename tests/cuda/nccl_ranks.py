# SPDX-License-Identifier: Apache-2.0
"""The NCCL transport between processes on one GPU: do all bytes arrive, does a lost rank end it?

    python tests/cuda/nccl_ranks.py --sites 2,2 [--seconds 50]

A process per rank. NCCL refuses two ranks on one GPU of one host, so each says it is a host of its
own and they talk by sockets: this tests what arrives, and says nothing about speed. At the end the
last rank leaves without a word, and all others must fail within the timeout. Exit status 1 if
something was wrong, or the seconds were up.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fomoe.comm import Topology
from fomoe.comm.nccl import NcclTransport

TIMEOUT = 20.0  # of a call, in seconds; the first ones set up connections
STAGES = ("inter_site", "intra_node")
LARGEST = (0, 1, 7, 4096, 1 << 20)  # bytes that a rank sends another, by round
ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "2",
}


def length(source: int, destination: int, limit: int) -> int:
    """Different for every pair, and 0 for some."""
    return limit * ((source + 2 * destination) % 4) // 3


def content(source: int, destination: int, limit: int) -> torch.Tensor:
    numbers = torch.arange(length(source, destination, limit))
    return ((numbers * 31 + 7 * source + destination) % 251).to(torch.uint8)


def exchange(transport: NcclTransport, rank: int, stage: str, limit: int) -> None:
    group = transport.group(stage)
    assert group == transport.topology.group(rank, stage)
    payload = torch.cat([content(rank, peer, limit) for peer in group]).cuda()
    send = [length(rank, peer, limit) for peer in group]
    receive = [length(peer, rank, limit) for peer in group]
    received = transport.all_to_all(stage, payload, send, receive)
    expected = torch.cat([content(peer, rank, limit) for peer in group])
    assert torch.equal(received.cpu(), expected), f"{stage}, up to {limit} bytes: wrong bytes"


def shared_id(folder: Path, rank: int) -> bytes:
    """Rank 0 writes it, all others wait for the file."""
    path = folder / "id"
    if rank == 0:
        path.with_suffix(".new").write_bytes(NcclTransport.unique_id())
        path.with_suffix(".new").replace(path)
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < deadline, "rank 0 wrote no unique id"
        time.sleep(0.05)
    return path.read_bytes()


def run_rank(sites: list[int], rank: int, folder: Path) -> None:
    torch.cuda.set_device(0)
    transport = NcclTransport(Topology(sites), rank, shared_id(folder, rank), TIMEOUT)
    counts = transport.gather_counts(torch.tensor([rank, 10 * rank]))
    assert counts.tolist() == [[other, 10 * other] for other in range(sum(sites))], counts
    for limit in LARGEST:
        for stage in STAGES:
            exchange(transport, rank, stage, limit)
    transport.gather_counts(torch.tensor([rank]))
    print(f"rank {rank}: all bytes arrived", flush=True)
    if rank == sum(sites) - 1:
        os._exit(0)
    said = "nothing"
    try:
        transport.gather_counts(torch.tensor([rank]))
    except RuntimeError as error:
        said = str(error)
    print(f"rank {rank} was told: {said}", flush=True)
    assert f"counts all-to-all of rank {rank}: " in said, "it must be told that a rank has left"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", required=True, help="numbers of ranks, as 2,2")
    parser.add_argument("--seconds", type=float, default=50.0, help="for all")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sites = [int(count) for count in options.sites.split(",")]
    if options.rank is not None:
        run_rank(sites, options.rank, options.folder)
        return 0
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--sites", options.sites, "--folder", folder]
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=os.environ | ENVIRONMENT | {"NCCL_HOSTID": f"rank{rank}"},
            )
            for rank in range(sum(sites))
        ]
        codes = []
        for process in processes:
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
    print(f"exit codes of the ranks: {codes}")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
