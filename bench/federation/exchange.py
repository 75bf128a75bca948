# SPDX-License-Identifier: Apache-2.0
"""Time of a meeting of four sites on this machine against a plain gloo all-reduce.

All contenders run in the same four processes, in turns: the all-reduce of the full model alone;
DiLoCo made of it, in a few lines of torch; and the whole end of a round of the trainer's diloco and
fomoe (differences, check, both ways, means, outer step, new parameters). `travel` of the trainer is
the same collectives once more, with the same buffers and nothing to be computed before. Ratios are
taken within a repetition; `over_payload` divides them by the ratio of the bytes sent: at most 1.2
is the target.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fomoe.bench.machine import machine, versions
from fomoe.bench.timing import in_turns, paired_ratio, spread
from fomoe.federation.config import FederationConfig
from fomoe.federation.exchange import GroupTransport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.meeting import Meetings
from fomoe.federation.memory import peak_rss
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.placement import Placement, everywhere, fixed
from fomoe.models import Decoder, DecoderConfig
from fomoe.nn import ModelTensor

SITES, OVERLAP = 4, 2
ALL_REDUCE, PLAIN_DILOCO = "all-reduce", "diloco all-reduce"
WARMUPS = 2
# Millions of parameters, nearly: width, which is the experts' as well, and layers of 16 experts.
SHAPES = {"5M": (192, 4), "50M": (512, 6), "100M": (1024, 3)}
CONTENDERS = {
    "diloco fp32": {"strategy": "diloco"},
    "fomoe fp32": {"strategy": "fomoe"},
    "fomoe bf16": {"strategy": "fomoe", "codec": "bf16"},
    "fomoe int8": {"strategy": "fomoe", "codec": "int8"},
    "fomoe int4": {"strategy": "fomoe", "codec": "int4"},
}
_NO_CODECS = ("100M",)  # what they keep would not fit four sites into 24 GB


def decoder(size: str) -> DecoderConfig:
    dim, num_layers = SHAPES[size]
    return DecoderConfig(
        vocab_size=256,
        dim=dim,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=dim // 4,
        expert_dim=dim,
        num_experts=16,
        top_k=4,
        activation="silu",
        score="sigmoid",
        norm="peri",
    )


class RecordingTransport(GroupTransport):
    """Remembers the calls of the last meeting, and can make them again."""

    calls: list[tuple[Tensor, list[int], Tensor, list[int]]]

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        self.calls = []
        return super().gather(values)

    def all_to_all(
        self, outbox: Tensor, send: list[int], inbox: Tensor, receive: list[int]
    ) -> None:
        self.calls.append((outbox, send, inbox, receive))
        super().all_to_all(outbox, send, inbox, receive)

    def again(self) -> Callable[[], None]:
        def call() -> None:
            super(RecordingTransport, self).gather([0])
            for arguments in self.calls:
                super(RecordingTransport, self).all_to_all(*arguments)

        return call


class PlainDiLoCo:
    """The same round's end with one all-reduce; every site has all momenta and takes all steps."""

    def __init__(self, tensors: Sequence[ModelTensor]) -> None:
        self.tensors = tensors
        self.flat = torch.zeros(sum(tensor.num_elements for tensor in tensors))
        self.momentum = torch.zeros_like(self.flat)
        sizes = [tensor.num_elements for tensor in tensors]
        self.deltas = torch.split(self.flat, sizes)
        self.momenta = torch.split(self.momentum, sizes)

    def prepare(self) -> None:
        self.start = [tensor.value.flatten().clone() for tensor in self.tensors]
        for tensor in self.tensors:
            tensor.value.mul_(0.999)

    def __call__(self) -> None:
        for tensor, start, delta in zip(self.tensors, self.start, self.deltas, strict=True):
            torch.sub(start, tensor.value.view(-1), out=delta)
        dist.all_reduce(self.flat)
        for tensor, start, delta, momentum in zip(
            self.tensors, self.start, self.deltas, self.momenta, strict=True
        ):
            delta.div_(SITES)
            momentum.mul_(0.9).add_(delta)
            step = delta.add_(momentum, alpha=0.9).mul_(0.7)
            torch.sub(start, step, out=tensor.value.view(-1))
        self.start = []


class Contender:
    """The end of a round of one strategy; all share the tensors of one full model."""

    def __init__(self, settings: FederationConfig, tensors: Sequence[ModelTensor]) -> None:
        num_layers = 1 + max(t.layer for t in tensors if t.layer is not None)
        num_experts = 1 + max(t.expert for t in tensors if t.expert is not None)
        sites, transport = settings.sites, RecordingTransport()
        placement = everywhere(num_layers, num_experts, sites)
        if settings.strategy == "fomoe":
            placement = fixed(num_layers, num_experts, sites, settings.overlap)
        self.tensors = [t for t in tensors if _is_here(t, placement, transport.site)]
        self.ledger = SiteLedger()
        self.transport = transport
        self.meetings = Meetings(settings, transport, self.ledger, self.tensors, placement)

    def prepare(self) -> None:
        self.meetings.begin_round({t.name: t.value for t in self.tensors})
        for tensor in self.tensors:
            tensor.value.mul_(0.999)

    def __call__(self) -> None:
        values = {tensor.name: tensor.value for tensor in self.tensors}
        meeting = self.meetings.meet(values, {}, 1024, failed=False)
        for tensor in self.tensors:
            meeting.write_value(tensor.name, tensor.value)
        self.meetings.commit()


def _is_here(tensor: ModelTensor, placement: Placement, site: int) -> bool:
    if tensor.on_every_site or tensor.layer is None or tensor.expert is None:
        return True
    return site in placement.holders(tensor.layer, tensor.expert)


def measure(size: str, names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """At every site, the same: a record for the all-reduce and for every contender."""
    model = Decoder(decoder(size))
    tensors = federated_tensors(model)
    num_elements = sum(tensor.num_elements for tensor in tensors)
    contenders = {}
    for name in names:
        options = CONTENDERS[name] | {"sites": SITES}
        if options["strategy"] == "fomoe":
            options["overlap"] = OVERLAP
        contenders[name] = Contender(FederationConfig(**options), tensors)
    plain_diloco, full = PlainDiLoCo(tensors), torch.ones(num_elements)
    times: dict[str, list[float]] = {name: [] for name in (ALL_REDUCE, PLAIN_DILOCO, *names)}
    travel: dict[str, list[float]] = {name: [] for name in names}
    repetition, spent = -WARMUPS, 0.0
    while repetition < 7 or spent < seconds:
        for name in in_turns(list(times), max(repetition, 0)):
            if name == ALL_REDUCE:
                taken = _slowest(lambda: dist.all_reduce(full))
                full.fill_(1.0)
            elif name == PLAIN_DILOCO:
                plain_diloco.prepare()
                taken = _slowest(plain_diloco)
            else:
                contender = contenders[name]
                contender.prepare()
                taken = _slowest(contender)
                travelled = _slowest(contender.transport.again())
            if repetition >= 0:
                times[name].append(taken)
                spent += taken
                if name in travel:
                    travel[name].append(travelled)
        repetition += 1
    return _records(size, num_elements, contenders, times, travel, repetition + WARMUPS)


def _records(
    size: str,
    num_elements: int,
    contenders: Mapping[str, Contender],
    times: Mapping[str, Sequence[float]],
    travel: Mapping[str, Sequence[float]],
    meetings: int,
) -> list[dict[str, Any]]:
    # In a ring, every site sends 2 (M - 1) / M of the tensor.
    plain = 2 * (SITES - 1) * 4 * num_elements
    records = []
    for name, seconds_taken in times.items():
        own, num_bytes = spread(seconds_taken), plain
        record = {
            "benchmark": "exchange",
            "size": size,
            "parameters": num_elements,
            "sites": SITES,
            "contender": name,
            "repetitions": len(seconds_taken),
            "median_s": own.median,
            "quartiles_s": [own.low, own.high],
            "best_s": own.best,
        }
        if name in contenders:
            sent = sum(contenders[name].ledger.close_round().values())
            num_bytes = round(_over_sites(sent / meetings, dist.ReduceOp.SUM))
            record["buffer_bytes"] = contenders[name].meetings.exchange.num_bytes()
            record["travel"] = _compared(travel[name], times[ALL_REDUCE], num_bytes / plain)
        record["bytes"], record["payload_ratio"] = num_bytes, num_bytes / plain
        record["meeting"] = _compared(seconds_taken, times[ALL_REDUCE], num_bytes / plain)
        records.append(record)
    return records


def _compared(
    seconds: Sequence[float], plain: Sequence[float], payload_ratio: float
) -> dict[str, Any]:
    ratio = paired_ratio(seconds, plain)
    return {
        "median_s": spread(seconds).median,
        "ratio": ratio.median,
        "over_payload": ratio.median / payload_ratio,
        "over_payload_quartiles": [ratio.low / payload_ratio, ratio.high / payload_ratio],
    }


def _slowest(work: Callable[[], object]) -> float:
    """Seconds of the slowest site, all starting together."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    return _over_sites(time.perf_counter() - begin, dist.ReduceOp.MAX)


def _over_sites(value: float, operation: Any) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, operation)
    return float(total)


def _site(site: int, rendezvous: str, cases: Sequence[Any], seconds: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(rendezvous, SITES)
    dist.init_process_group("gloo", store=store, rank=site, world_size=SITES)
    for size, names in cases:
        records = measure(size, names, seconds)
        if site == 0:
            pipe.send(records)
    if site == 0:
        pipe.send(peak_rss())
    dist.barrier()
    dist.destroy_process_group()


def _print(records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        low, high = record["quartiles_s"]
        line = (
            f"{record['size']:>5} {record['contender']:<18} {record['median_s'] * 1e3:8.1f} ms "
            f"({low * 1e3:.1f}-{high * 1e3:.1f}), payload {record['payload_ratio']:.3f}; "
            "over payload: "
        )
        for part in ("travel", "meeting"):
            if part in record:
                low, high = record[part]["over_payload_quartiles"]
                line += f"{part} {record[part]['over_payload']:.2f} ({low:.2f}-{high:.2f}) "
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", action="append", choices=SHAPES, help="all by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed work per size")
    parser.add_argument("--output", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    sizes = arguments.size or list(SHAPES)
    cases = [
        (s, [n for n in CONTENDERS if s not in _NO_CODECS or n.endswith("fp32")]) for s in sizes
    ]
    about = {
        "machine": machine(["fp32"], 1, torch.device("cpu")),
        "versions": versions(),
    }
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_site,
                args=(site, f"{folder}/store", cases, arguments.seconds, sender),
                daemon=True,
            )
            for site in range(SITES)
        ]
        for process in processes:
            process.start()
        sender.close()
        groups = []
        try:
            for _ in cases:
                groups.append(receiver.recv())
                _print(groups[-1])
            receiver.recv()
        except EOFError:
            raise SystemExit("a site ended early") from None
        for process in processes:
            process.join()
    if arguments.output:
        lines = [json.dumps(record | about) for group in groups for record in group]
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
