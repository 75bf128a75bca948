# SPDX-License-Identifier: Apache-2.0
"""Time of a meeting of four sites on this machine against a plain gloo all-reduce.

All contenders run in the same four processes, in turns: the all-reduce of the full model, and the
whole end of a round (check, differences, both ways, outer step, new parameters) of diloco and
fomoe. A ratio is taken within a repetition; ``over_payload`` is that ratio over the ratio of the
bytes sent, at most 1.2 to be good.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
ALL_REDUCE = "all-reduce"
WARMUPS = 2
# Millions of parameters, nearly: width, which is the experts' as well, and layers of 16 experts.
SHAPES = {"5M": (192, 4), "50M": (512, 6), "200M": (1024, 5)}
CONTENDERS = {
    "diloco fp32": {"strategy": "diloco"},
    "fomoe fp32": {"strategy": "fomoe"},
    "fomoe bf16": {"strategy": "fomoe", "codec": "bf16"},
    "fomoe int8": {"strategy": "fomoe", "codec": "int8"},
    "fomoe int4": {"strategy": "fomoe", "codec": "int4"},
}
_NO_CODECS = ("200M",)  # their residuals would not fit four sites into 24 GB


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


class Contender:
    """The end of a round of one strategy; all share the tensors of one full model."""

    def __init__(self, settings: FederationConfig, tensors: Sequence[ModelTensor]) -> None:
        num_layers = 1 + max(t.layer for t in tensors if t.layer is not None)
        num_experts = 1 + max(t.expert for t in tensors if t.expert is not None)
        sites, transport = settings.sites, GroupTransport()
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
    full = torch.ones(num_elements)
    times: dict[str, list[float]] = {name: [] for name in (ALL_REDUCE, *names)}
    inside: dict[str, list[float]] = {name: [] for name in names}
    repetition, spent = -WARMUPS, 0.0
    while repetition < 7 or spent < seconds:
        for name in in_turns(list(times), max(repetition, 0)):
            if name == ALL_REDUCE:
                taken = _slowest(lambda: dist.all_reduce(full))
                full.fill_(1.0)
            else:
                contender = contenders[name]
                contender.prepare()
                before = contender.transport.seconds
                taken = _slowest(contender)
                travelling = contender.transport.seconds - before
            if repetition >= 0:
                times[name].append(taken)
                spent += taken
                if name != ALL_REDUCE:
                    inside[name].append(travelling)
        repetition += 1
    # In a ring, every site sends 2 (M - 1) / M of the tensor.
    plain = 2 * (SITES - 1) * 4 * num_elements
    records = [_record(size, ALL_REDUCE, num_elements, plain, times[ALL_REDUCE])]
    for name in names:
        mine = sum(contenders[name].ledger.close_round().values()) / (repetition + WARMUPS)
        total = _sum(mine)
        record = _record(size, name, num_elements, round(total), times[name])
        ratio = paired_ratio(times[name], times[ALL_REDUCE])
        payload = total / plain
        record |= {
            "ratio": ratio.median,
            "payload_ratio": payload,
            "over_payload": ratio.median / payload,
            "over_payload_quartiles": [ratio.low / payload, ratio.high / payload],
            "travelling_share": statistics.median(
                a / b for a, b in zip(inside[name], times[name], strict=True)
            ),
            "scratch_bytes": contenders[name].meetings.exchange.scratch.peak,
        }
        records.append(record)
    return records


def _slowest(work: Callable[[], object]) -> float:
    """Seconds of the slowest site, all starting together."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _sum(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def _record(
    size: str, name: str, num_elements: int, num_bytes: int, seconds: Sequence[float]
) -> dict[str, Any]:
    own = spread(seconds)
    return {
        "benchmark": "exchange",
        "size": size,
        "parameters": num_elements,
        "sites": SITES,
        "contender": name,
        "repetitions": len(seconds),
        "bytes": num_bytes,
        "median_s": own.median,
        "quartiles_s": [own.low, own.high],
        "best_s": own.best,
    }


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
        line = (
            f"{record['size']:>5} {record['contender']:<12} {record['median_s'] * 1e3:9.1f} ms "
            f"({record['quartiles_s'][0] * 1e3:.1f}-{record['quartiles_s'][1] * 1e3:.1f})"
        )
        if "ratio" in record:
            low, high = record["over_payload_quartiles"]
            line += (
                f"  {record['ratio']:.2f}x all-reduce, payload {record['payload_ratio']:.3f}x: "
                f"{record['over_payload']:.2f} ({low:.2f}-{high:.2f}), "
                f"{record['travelling_share']:.0%} of it travelling"
            )
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
