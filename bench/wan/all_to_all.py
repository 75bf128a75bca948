# SPDX-License-Identifier: Apache-2.0
"""The hierarchical all-to-all against a flat one, between sites joined by slow links; see links.py.

Every site is a network namespace with some ranks, so this needs root. A repetition sends tokens to
their experts and sums back, forward only: the hierarchical exchange of fomoe.comm, and the flat one
in a few lines of torch, a row per token and expert in one all_to_all_single to the owner. gloo's
may fill a link one way at a time (fomoe.comm.pairwise says why), so the flat one runs as well with
receives posted before sends, as the hierarchical one does. All exchange counts first. In turns,
slowest rank, median and quartiles. Results are checked first.

Bytes of rows, ids, weights and counts are counted where they are handed to a collective, those that
leave their site; `minimum_bytes` are rows alone, once per token and remote site, there and back.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import Link, Machines, machines
from torch import Tensor

from fomoe.bench.machine import versions
from fomoe.bench.timing import in_turns, paired_ratio, spread
from fomoe.comm import C10dTransport, ExpertExchange, Topology
from fomoe.comm.pairwise import all_to_all
from fomoe.ops import combine, permute, route

_PORT = 29600
FLAT, RECEIVE_FIRST, HIERARCHICAL = "flat", "flat, receives first", "hierarchical"


class Flat:
    """A row per token and expert, straight to the owner and back; weights are applied at home."""

    def __init__(
        self, topology: Topology, owners: Sequence[int], receive_first: bool = False
    ) -> None:
        self.topology, self.rank = topology, dist.get_rank()
        self.receive_first = receive_first
        self.owners = torch.tensor(owners, dtype=torch.int32)
        self.inter_site_bytes = 0

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ranks = self.topology.num_ranks
        routing = route(ids, self.owners, ranks)
        send = routing.offsets.diff().to(torch.int64)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        to, back = send.tolist(), receive.tolist()
        slots = routing.row_to_slot[: sum(to)].long()
        # As uint8: a row with its id is one message.
        rows = permute(x, routing)[: sum(to)].view(torch.uint8)
        ids_of_rows = ids.flatten()[slots][:, None].view(torch.uint8)
        arrived = self._all_to_all(torch.cat([rows, ids_of_rows], dim=1), to, back)
        arrived_rows, arrived_ids = arrived.split([rows.shape[1], 4], dim=1)
        made = _expert(
            arrived_rows.contiguous().view(x.dtype),
            arrived_ids.contiguous().view(torch.int32)[:, 0],
        )
        returned = self._all_to_all(made.view(torch.uint8), back, to).view(x.dtype)
        padded = x.new_empty(ids.numel(), x.shape[1])
        padded[: len(returned)] = returned
        here = self.topology.site_of(self.rank)
        away = sum(self.topology.site_of(rank) != here for rank in range(ranks))
        self.inter_site_bytes += 8 * away
        return combine(padded, weights, routing)

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        width = rows.shape[1]
        arrived = rows.new_empty(sum(receive), width)
        if self.receive_first:
            sizes = [width * count for count in receive], [width * count for count in send]
            all_to_all(arrived.view(-1), rows.reshape(-1), *sizes, None)
        else:
            dist.all_to_all_single(arrived, rows, receive, send)
        here = self.topology.site_of(self.rank)
        for rank, count in enumerate(send):
            self.inter_site_bytes += count * width * (self.topology.site_of(rank) != here)
        return arrived


class Hierarchical:
    def __init__(self, topology: Topology, owners: Sequence[int]) -> None:
        self.exchange = ExpertExchange(C10dTransport(topology), owners)
        mine = [owner == dist.get_rank() for owner in owners]
        self.mine = torch.tensor([*mine, False])

    @property
    def inter_site_bytes(self) -> int:
        return self.exchange.bytes_sent["inter_site"]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, row_ids, row_weights, trip = self.exchange.dispatch(x, ids, weights)
        mine = torch.where(self.mine[row_ids.long()], row_weights, 0)
        factor = (mine * _factor(row_ids)).sum(1, keepdim=True)
        return self.exchange.combine(rows * factor.to(x.dtype), trip)


def _factor(ids: Tensor) -> Tensor:
    return 1 + ids % 3


def _expert(rows: Tensor, ids: Tensor) -> Tensor:
    """In place of an expert, so that the time is the exchange's."""
    return rows * _factor(ids)[:, None].to(rows.dtype)


def work(settings: dict[str, Any], rank: int, address: str) -> None:
    """One rank; rank 0 prints the record as JSON."""
    topology = Topology(settings["ranks_per_site"])
    store = dist.TCPStore(address, _PORT, topology.num_ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=topology.num_ranks)
    torch.set_num_threads(1)
    owners = [expert % topology.num_ranks for expert in range(settings["experts"])]
    generator = torch.Generator().manual_seed(settings["seed"] * 1000 + rank)
    scores = torch.rand(settings["tokens"], settings["experts"], generator=generator)
    weights, ids = scores.topk(settings["top_k"])
    ids = ids.to(torch.int32)
    x = torch.randn(settings["tokens"], settings["dim"], generator=generator).bfloat16()
    contenders = {
        FLAT: Flat(topology, owners),
        RECEIVE_FIRST: Flat(topology, owners, receive_first=True),
        HIERARCHICAL: Hierarchical(topology, owners),
    }
    right = x.float() * (weights * _factor(ids)).sum(1, keepdim=True)
    for name, contender in contenders.items():
        error = (
            (contender(x, ids, weights).float() - right).abs().max() / right.abs().max()
        ).item()
        if error > 0.02:
            raise SystemExit(f"{name}: relative error {error:.3g}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    sent = {name: contender.inter_site_bytes for name, contender in contenders.items()}
    for repetition in range(settings["repetitions"]):
        for name in in_turns(list(contenders), repetition):
            times[name].append(_slowest(lambda c=contenders[name]: c(x, ids, weights)))
    here = topology.site_of(rank)
    sites = torch.tensor([topology.site_of(owner) for owner in owners])[ids.long()]
    remote = sum(int((sites == s).any(1).sum()) for s in range(topology.num_sites) if s != here)
    counts = torch.tensor([
        *((c.inter_site_bytes - sent[n]) // settings["repetitions"] for n, c in contenders.items()),
        remote * x.shape[1] * 2 * 2,
    ])  # fmt: skip
    dist.all_reduce(counts)
    *sent_bytes, minimum = counts.tolist()
    if rank == 0:
        record = settings | {
            "seconds": {name: spread(values)._asdict() for name, values in times.items()},
            "times_faster": {
                name: paired_ratio(times[name], times[HIERARCHICAL])._asdict()
                for name in (FLAT, RECEIVE_FIRST)
            },
            "inter_site_bytes": dict(zip(contenders, sent_bytes, strict=True)),
            "minimum_bytes": minimum,
        }
        print(json.dumps(record), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _slowest(call: Callable[[], Any]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    call()
    taken = torch.tensor([time.perf_counter() - begin])
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return taken.item()


def measure(net: Machines, settings: dict[str, Any]) -> dict[str, Any]:
    ranks = [
        (site, place) for site, n in enumerate(settings["ranks_per_site"]) for place in range(n)
    ]
    processes = []
    try:
        for rank, (site, _) in enumerate(ranks):
            command = net.command(
                site, sys.executable, __file__, "--settings", json.dumps(settings),
                "--rank", str(rank), "--address", net.address(0),
            )  # fmt: skip
            environment = os.environ | {
                "GLOO_SOCKET_IFNAME": net.interface(site),
                "OMP_NUM_THREADS": "1",
            }
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            )
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed")
    record: dict[str, Any] = json.loads(outputs[0])
    return record


def print_table(records: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'sites':>6}{'ranks':>7}{'D':>7}{'hier. s':>9}{'than flat':>20}{'receives first':>20}"
        f"{'flat MB':>9}{'hier. MB':>10}{'over minimum':>14}"
    )
    for record in records:
        sent = record["inter_site_bytes"]
        faster = "".join(
            f"{times['median']:9.2f} ({times['low']:.2f}-{times['high']:.2f})"
            for times in record["times_faster"].values()
        )
        print(
            f"{len(record['ranks_per_site']):6}{sum(record['ranks_per_site']):7}{record['dim']:7}"
            f"{record['seconds'][HIERARCHICAL]['median']:9.3f}{faster}"
            f"{sent[FLAT] / 1e6:9.2f}{sent[HIERARCHICAL] / 1e6:10.2f}"
            f"{sent[HIERARCHICAL] / record['minimum_bytes']:14.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="of every rank")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the routing")
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.settings is not None:
        work(arguments.settings, arguments.rank, arguments.address)
        return
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up then, too
    link, records = Link(), []
    for ranks_per_site in ([1, 1], [2, 2], [1, 1, 1, 1]):
        settings = {
            "ranks_per_site": ranks_per_site, "experts": 128, "top_k": 8, "dtype": "bfloat16",
            "tokens": arguments.tokens, "dim": arguments.dim, "seed": arguments.seed,
            "repetitions": arguments.repetitions, "link_bits_per_second": link.rate,
            "link_delay_seconds": link.delay,
        }  # fmt: skip
        with machines(len(ranks_per_site), link) as net:
            records.append(measure(net, settings))
        print(f"{ranks_per_site}: done", file=sys.stderr)
    print_table(records)
    if arguments.output:
        about = {"benchmark": "all-to-all", "load_average": os.getloadavg()[0]}
        with arguments.output.open("w") as file:
            for record in records:
                file.write(json.dumps(about | {"versions": versions()} | record) + "\n")


if __name__ == "__main__":
    main()
