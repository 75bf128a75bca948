# SPDX-License-Identifier: Apache-2.0
"""Ranks that are processes and have a model's groups among them: what each of them does."""

import datetime
import os
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from fomoe.comm import C10dTransport, ExpertExchange, Topology
from fomoe.errors import CommunicationError
from fomoe.generate import Generation, Sampling, generate
from fomoe.models import Decoder, DecoderConfig, FoE, FoEConfig
from fomoe.models.foe import GroupRanks
from fomoe.models.normalization import RMSNorm
from fomoe.nn import auxiliary_loss, initialize, model_tensors

NUM_RANKS = 4
CONFIG = FoEConfig(
    vocab_size=40, dim=16, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=4, expert_dim=6,
    num_experts=16, top_k=8,
)  # fmt: skip
# By the number of ranks of a group: one rank with two groups, one with one, and so on.
SHAPES = {
    "2 groups a rank": replace(CONFIG, num_kv_heads=8),
    "1 group a rank": replace(
        CONFIG, tie_embeddings=False, renormalize=True, norm="peri", softmax_over="all"
    ),
    "2 ranks a group": replace(CONFIG, num_kv_heads=2),
    "4 ranks a group": replace(CONFIG, num_kv_heads=1, num_experts=6, top_k=3),
}
SHAPES["1 group a rank, two nodes"] = replace(CONFIG, dim=17)
NODES = dict.fromkeys(SHAPES, (4,)) | {
    "2 ranks a group": (2, 2),
    "1 group a rank, two nodes": (2, 2),
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
GENERATION = Generation(
    max_new_tokens=6, sampling=Sampling(temperature=1.0, top_p=0.9, seed=5), prefill_tokens=2
)


def tokens_of(member: int) -> Tensor:
    """(B, S + 1)."""
    generator = torch.Generator().manual_seed(member)
    return torch.randint(0, 40, (3, 6), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + auxiliary_loss(model)


def work(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, NUM_RANKS, is_master=False)
    limit = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=limit)
    try:
        found = {name: trained(config, NODES[name]) for name, config in SHAPES.items()}
        found["moe"] = moe_rows()
        groups = GroupRanks(CONFIG, timeout=60)
        dist.barrier()
        if rank == 3:
            results.put((rank, found))
            results.close()
            results.join_thread()
            os._exit(0)  # without a word to the others
        results.put((rank, found | {"lost": sum_without_the_last(groups)}))
    except Exception:
        results.put((rank, traceback.format_exc()))
        raise


def sum_without_the_last(groups: GroupRanks) -> str:
    try:
        groups.sum(torch.ones(4))
    except CommunicationError as error:
        return str(error)
    return "it ended well"


def trained(config: FoEConfig, nodes: Sequence[int]) -> dict[str, Any]:
    ranks = GroupRanks(config, nodes)
    model = FoE(config, ranks=ranks).double()
    initialize(model, seed=2)
    tokens = tokens_of(ranks.member)
    with recorded() as calls, torch.no_grad():
        logits = model(tokens[:, :-1])
    forward = ranks.sum.num_calls, ranks.sum.bytes_added
    loss_of(model, tokens).backward()
    ranks.finish_gradients(model)
    count = len(PROMPTS) // ranks.members
    own = range(ranks.member * count, (ranks.member + 1) * count)
    texts = generate(
        model.eval(), PROMPTS[own.start : own.stop], GENERATION, first=own.start, any_rank=any_rank
    )
    return {
        "member": ranks.member,
        "groups": (ranks.groups.start, ranks.groups.stop),
        "logits": logits.numpy(),
        "calls": calls,
        "forward": forward,
        "gradients": {t.name: t.of(t.parameter.grad).numpy() for t in model_tensors(model)},
        "texts": dict(zip(own, texts, strict=True)),
        "planted": planted_rows(config, nodes),
    }


def any_rank(here: bool) -> bool:
    said = torch.tensor(here)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


@contextmanager
def recorded():
    """(name, ranks, bytes) of all collectives called; torch's own count confirms it."""
    calls: list[tuple[str, tuple[int, ...], int]] = []
    in_sight: list[str] = []
    names = [
        "all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all", "all_to_all_single",
        "reduce_scatter", "reduce_scatter_tensor", "broadcast", "gather", "scatter", "reduce",
        "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier",
    ]  # fmt: skip
    originals = {name: getattr(dist, name) for name in names}

    def recording(name):
        def call(*arguments, group=None, **settings):
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            payload = tensors[-1].numel() * tensors[-1].element_size() if tensors else 0
            ranks = range(NUM_RANKS) if group is None else dist.get_process_group_ranks(group)
            calls.append((name, tuple(ranks), payload))
            # torch does not look into our ops, and does not count what two ranks do alone.
            if torch._C._len_torch_dispatch_stack() > 0 and name not in ("isend", "irecv"):
                in_sight.append(name)
            return originals[name](*arguments, group=group, **settings)

        return call

    for name in names:
        setattr(dist, name, recording(name))
    try:
        with CommDebugMode() as mode:
            yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    if sum(mode.get_comm_counts().values()) != len(in_sight):
        raise AssertionError(f"torch counted {mode.get_comm_counts()}, the calls were {calls}")


# ---- rows that travel, with a routing that is the same for every rank ---------------------------


def planted_rows(config: FoEConfig, nodes: Sequence[int]) -> dict[str, int]:
    """What this rank sends in one forward of 16 tokens, with an expert on every rank each."""
    ranks = GroupRanks(config, nodes)
    size, members = config.experts_per_group, ranks.members
    config = replace(
        config,
        dim=16,
        top_k=members * config.num_groups,
        num_layers=1,
        norm="pre",
        tie_embeddings=False,
    )
    model = FoE(config, ranks=ranks)
    firsts = [-(-member * size // members) for member in range(members)]
    experts = [group * size + first for group in range(config.num_groups) for first in firsts]
    plant(model, [experts] * 16)
    return rows_of(model, members) | {"reduced": ranks.sum.bytes_added // (16 * 4)}


def moe_rows() -> dict[str, int]:
    """The same of an expert-parallel decoder: 4 of 16 experts, each on another rank."""
    config = DecoderConfig(
        vocab_size=40, dim=16, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=4,
        expert_dim=6, num_experts=16, top_k=4, tie_embeddings=False,
    )  # fmt: skip
    transport = C10dTransport(Topology([NUM_RANKS]))
    exchange = ExpertExchange(transport, [expert // 4 for expert in range(16)])
    model = Decoder(config, exchanges=[exchange])
    plant(model, [[4 * rank + (t + rank) % 4 for rank in range(4)] for t in range(16)])
    return rows_of(model, NUM_RANKS)


@torch.no_grad()
def plant(model: nn.Module, chosen: list[list[int]]) -> None:
    """Token t chooses ``chosen[t]``: its embedding is a unit vector that only their rows see."""
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (module for module in model.modules() if isinstance(module, RMSNorm)):
        norm.weight.fill_(1)
    model.embedding.weight[:16] = torch.eye(16)
    for token, experts in enumerate(chosen):
        model.layers[0].moe.router.weight[experts, token] = 1


def rows_of(model: nn.Module, members: int) -> dict[str, int]:
    """Rows, and bytes of all that is not rows, that this rank sends for its part of 16 tokens."""
    rank = dist.get_rank()
    exchange = model.layers[0].moe.exchange
    counts = []
    if exchange is not None:
        exchange_counts = exchange._exchange_counts
        exchange._exchange_counts = lambda *a: counts.append(exchange_counts(*a)) or counts[-1]
    per_rank = 16 // members
    first = rank % members * per_rank
    with torch.no_grad():
        model(torch.arange(first, first + per_rank)[None])
    if exchange is None:
        return {"rows": 0, "beside": 0}
    place = exchange.rank
    to = counts[0][place, 1:].tolist()  # a single site, then its ranks
    rows = sum(n for other, n in enumerate(to) if other != place)
    sent = sum(n for link, n in exchange.bytes_sent.items() if link != "local")
    return {"rows": 2 * rows, "beside": sent - 2 * rows * 16 * 4}
