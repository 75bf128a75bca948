# SPDX-License-Identifier: Apache-2.0
"""FoE against an expert-parallel MoE of the same size: latency over ranks, and where FoE wins.

    python bench/generation/foe_latency.py --output RESULTS.jsonl            # ranks of one machine
    python bench/generation/foe_latency.py --slow-link --output RESULTS.jsonl  # two nodes; root

Both models have one shape, and all ranks talk by gloo. Forward: logits of all tokens of a batch,
in turns, the slowest rank; of the MoE every rank has its part of the tokens, of the FoE every rank
has all of them and its groups. TTFT is the prefill of the prompts, TBT a step of decode, with the
cache. With --slow-link, half of the ranks are in a network namespace of their own, joined to the
other half by 100 Mbit/s and 20 ms, see bench/wan/links.py. Bytes are what rank 0 sends to others in
the all-to-alls of a MoE, and what it has added up in the all-reduces of a FoE.
"""

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fomoe.bench.machine import versions
from fomoe.bench.timing import in_turns, paired_ratio, spread
from fomoe.comm import C10dTransport, ExpertExchange, Topology
from fomoe.generate import Generation, stream
from fomoe.models import Decoder, DecoderConfig, FoE, FoEConfig
from fomoe.models.foe import GroupRanks
from fomoe.nn import initialize

MOE, FOE = "MoE", "FoE"
SHAPE = {
    "vocab_size": 256, "dim": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8,
    "head_dim": 32, "expert_dim": 128, "num_experts": 64, "top_k": 8, "tie_embeddings": False,
}  # fmt: skip
SEQUENCE = 128
NEW_TOKENS = 8


def work(settings: dict[str, Any], rank: int, address: str, port: int) -> None:
    """One rank; rank 0 prints a JSON line per number of tokens."""
    torch.set_num_threads(1)
    size = sum(settings["nodes"])
    store = dist.TCPStore(address, port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    transport = C10dTransport(Topology(settings["nodes"]))
    owners = [expert * size // SHAPE["num_experts"] for expert in range(SHAPE["num_experts"])]
    exchanges = [ExpertExchange(transport, owners) for _ in range(SHAPE["num_layers"])]
    groups = GroupRanks(FoEConfig(**SHAPE), settings["nodes"])
    moe = Decoder(DecoderConfig(**SHAPE), exchanges=exchanges).bfloat16().eval()
    foe = FoE(FoEConfig(**SHAPE), ranks=groups).bfloat16().eval()
    for model in (moe, foe):
        initialize(model, seed=0)

    def sent() -> dict[str, int]:
        away = sum(n for e in exchanges for link, n in e.bytes_sent.items() if link != "local")
        return {MOE: away, FOE: groups.sum.bytes_added}

    for tokens in settings["tokens"]:
        everyone = sequences(tokens)
        first, last = (-(-part * len(everyone) // size) for part in (rank, rank + 1))
        parts = {MOE: everyone[first:last], FOE: everyone}
        models = {MOE: moe, FOE: foe}
        calls = {name: forward(models[name], parts[name]) for name in models}
        before = sent()
        for call in calls.values():
            call()
        handed = {name: number - before[name] for name, number in sent().items()}
        record: dict[str, Any] = {"tokens": tokens, "rank_0_bytes": handed}
        record["forward"] = measured(calls, settings["repetitions"])
        if tokens in settings["generate"]:
            steps = {name: generation(models[name], parts[name]) for name in models}
            record |= generated(steps, settings["repetitions"])
        if rank == 0:
            print(json.dumps(settings | record), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def sequences(tokens: int) -> list[list[int]]:
    """Of at most ``SEQUENCE`` tokens."""
    generator = torch.Generator().manual_seed(tokens)
    everything = torch.randint(256, (tokens,), generator=generator).tolist()
    length = min(SEQUENCE, tokens)
    return [everything[i : i + length] for i in range(0, tokens, length)]


def forward(model: Decoder | FoE, part: list[list[int]]) -> Callable[[], object]:
    length = len(part[0]) if part else 1
    tokens = torch.tensor(part, dtype=torch.int64).reshape(-1, length)

    @torch.no_grad()
    def call() -> object:
        return model.unembed(model.hidden(tokens))

    return call


def generation(model: Decoder | FoE, part: list[list[int]]) -> Callable[[], list[float]]:
    """The time of every step; the first is the prefill."""

    def call() -> list[float]:
        times = [time.perf_counter()]
        for _ in stream(
            model,
            part,
            Generation(max_new_tokens=NEW_TOKENS),
            any_rank=any_rank,
        ):
            times.append(time.perf_counter())
        return [end - begin for begin, end in itertools.pairwise(times)]

    return call


def any_rank(here: bool) -> bool:
    said = torch.tensor(int(here))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def measured(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        for name in in_turns(list(calls), repetition):
            dist.barrier()
            begin = time.perf_counter()
            calls[name]()
            times[name].append(slowest(time.perf_counter() - begin))
    return compared(times)


def generated(calls: dict[str, Callable[[], list[float]]], repetitions: int) -> dict[str, Any]:
    first: dict[str, list[float]] = {name: [] for name in calls}
    between: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        for name in in_turns(list(calls), repetition):
            dist.barrier()
            steps = calls[name]()
            first[name].append(slowest(steps[0] if steps else 0.0))
            rest = sum(steps[1:]) / (NEW_TOKENS - 1)
            between[name].append(slowest(rest))
    return {"ttft": compared(first), "tbt": compared(between)}


def slowest(seconds: float) -> float:
    taken = torch.tensor([seconds])
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "seconds": {name: spread(values)._asdict() for name, values in times.items()},
        "moe_over_foe": paired_ratio(times[MOE], times[FOE])._asdict(),
    }


# ---- the processes ------------------------------------------------------------------------------


def run(settings: dict[str, Any], slow: bool) -> Iterator[dict[str, Any]]:
    """The records of one number of ranks."""
    with ExitStack() as stack:
        command: Callable[..., list[str]]
        if slow:
            sys.path.insert(0, str(Path(__file__).parents[1] / "wan"))
            from links import Link, machines

            link = Link()
            net = stack.enter_context(machines(len(settings["nodes"]), link))
            settings |= {"link_bits_per_second": link.rate, "link_delay_seconds": link.delay}
            command, interface, address = net.command, net.interface, net.address(0)
        else:
            command = lambda _, *words: list(words)  # noqa: E731
            interface, address = (lambda _: "lo"), "127.0.0.1"
        port = free_port()
        processes = []
        for rank, node in enumerate(
            n for n, size in enumerate(settings["nodes"]) for _ in range(size)
        ):
            environment = os.environ | {
                "GLOO_SOCKET_IFNAME": interface(node),
                "OMP_NUM_THREADS": "1",
            }
            process = subprocess.Popen(
                command(node, sys.executable, __file__, "--settings", json.dumps(settings),
                        "--rank", str(rank), "--address", address, "--port", str(port)),
                env=environment, stdout=subprocess.PIPE if rank == 0 else None, text=True,
            )  # fmt: skip
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            yield json.loads(line)
        if any(process.wait() for process in processes):
            raise SystemExit("a rank failed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def row(record: dict[str, Any]) -> str:
    def cell(name: str) -> str:
        if name not in record:
            return f"{'':>34}"
        seconds, ratio = record[name]["seconds"], record[name]["moe_over_foe"]
        return (
            f"{seconds[MOE]['median'] * 1e3:9.1f}{seconds[FOE]['median'] * 1e3:9.1f}"
            f"{ratio['median']:6.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
        )

    sent = record["rank_0_bytes"]
    nodes = "+".join(map(str, record["nodes"]))
    return (
        f"{nodes:>6}{record['tokens']:8}{cell('forward')}{cell('ttft')}{cell('tbt')}"
        f"{sent[MOE] / 1e6:9.2f}{sent[FOE] / 1e6:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 128, 512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument("--generate", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--slow-link", action="store_true", help="two nodes; needs root")
    parser.add_argument("--output", type=Path, help="JSON lines")
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.settings is not None:
        work(arguments.settings, arguments.rank, arguments.address, arguments.port)
        return
    if arguments.slow_link and os.geteuid() != 0:
        parser.error("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up then, too
    titles = "".join(f"{t + ' MoE':>9}{'FoE ms':>9}{'MoE/FoE':>16}" for t in ("all", "TTFT", "TBT"))
    print(f"{'ranks':>6}{'tokens':>8}{titles}{'MoE MB':>9}{'FoE MB':>9}")
    about = {"benchmark": "foe-latency", "load_average": os.getloadavg()[0], "shape": SHAPE}
    for ranks in arguments.ranks:
        nodes = [ranks // 2, ranks // 2] if arguments.slow_link else [ranks]
        settings = {
            "nodes": nodes, "tokens": arguments.tokens, "generate": arguments.generate,
            "repetitions": arguments.repetitions, "dtype": "bfloat16",
        }  # fmt: skip
        for record in run(settings, arguments.slow_link):
            print(row(record), flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(about | {"versions": versions()} | record) + "\n")


if __name__ == "__main__":
    main()
