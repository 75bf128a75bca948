# SPDX-License-Identifier: Apache-2.0
"""Ranks that are processes, talking by gloo: what each of them does."""

import datetime
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layers import generator, num_tokens_of, random_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fomoe.comm import C10dTransport, ExpertExchange, Topology, Transport
from fomoe.comm.pairwise import all_to_all
from fomoe.models import Decoder, DecoderConfig
from fomoe.nn import initialize
from fomoe.nn.expert_parallel import clip_grad_norm, expert_parameters, finish_expert_gradients

SITES = (2, 2)
MAX_NORM = 0.3
OWNERS = ([0, 1, 2, 3, 0, 1, 2, 3], [3, 3, 2, 1, 0, 0, 1, 2])
# Rank 3 owns no expert of the third mesh, and sites are uneven in it.
UNEVEN = (3, 1), ([0, 1, 2, 2, 0, 1, 2, 0], [3, 3, 3, 3, 0, 0, 1, 2])
CONFIG = DecoderConfig(
    vocab_size=32, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, expert_dim=12,
    num_experts=8, top_k=2,
)  # fmt: skip


def tokens_of(rank: int) -> Tensor:
    """(B, S + 1), of a different number of sequences on every rank."""
    return torch.randint(0, 32, (rank + 1, 9), generator=generator(rank))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def start(rank: int, size: int, port: int, timeout: float = 300.0) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip


def routed(transport: Transport, dtype: torch.dtype) -> list[Tensor]:
    """What comes back, and gradients, of a few exchanges whose experts multiply rows."""
    results: list[Tensor] = []
    for seed in range(3):
        exchange = ExpertExchange(transport, OWNERS[seed % 2])
        num_tokens = num_tokens_of(transport.rank, seed)
        x = torch.randn(num_tokens, 5, generator=generator(seed), dtype=torch.float64)
        x = x.to(dtype).requires_grad_()
        ids = random_ids(num_tokens, seed + transport.rank)
        weights = torch.rand(ids.shape, generator=generator(seed)).requires_grad_()
        arrived = exchange.dispatch(x, ids, weights)
        scale = (arrived.weights * (arrived.ids + 1)).sum(1, keepdim=True)
        y = exchange.combine(arrived.rows * scale.to(dtype), arrived.trip)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, weights])
        results += [y.detach(), *gradients, torch.tensor(list(exchange.bytes_sent.values()))]
    return results


def gradients_of(
    transport: Transport, owners: Any, wrap: Callable[[nn.Module], nn.Module]
) -> dict[str, Tensor]:
    """Of the loss over the tokens of all ranks, clipped, by name; of experts by id."""
    exchanges = [ExpertExchange(transport, layer) for layer in owners]
    model = Decoder(CONFIG, exchanges=exchanges)
    initialize(model, 0)
    ranks = transport.topology.num_ranks
    wrapped = wrap(model)
    tokens = tokens_of(transport.rank)
    everyones = sum(len(tokens_of(rank)) for rank in range(ranks))
    (loss_of(wrapped, tokens) * len(tokens) * ranks / everyones).backward()
    finish_expert_gradients(model, ranks)
    norm = clip_grad_norm(model, MAX_NORM)
    gradients = {"norm": norm}
    experts = expert_parameters(model)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name in experts:
            ids = exchanges[int(name.split(".")[1])].experts
            gradients |= {f"{name}.{e}": g for e, g in zip(ids, gradient, strict=True)}
        elif gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            gradients[name] = whole.clone()
    return gradients


def distributed_data_parallel(model: nn.Module) -> nn.Module:
    names = list(expert_parameters(model))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return DistributedDataParallel(model, broadcast_buffers=False)


def fully_sharded(model: nn.Module) -> nn.Module:
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    own = set(expert_parameters(model).values())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=own)
    fully_shard(model, mesh=mesh, ignored_params=own)
    # While one layer exchanges tokens, the parameters of the next one are on their way.
    for layer, following in zip(model.layers, [*model.layers[1:], None], strict=True):
        layer.set_modules_to_forward_prefetch([following] if following is not None else [])
    return model


def work(rank: int, port: int, results: Any) -> None:
    """Everything that four ranks do without failing."""
    start(rank, 4, port)
    transport = C10dTransport(Topology(SITES))
    found: dict[str, Any] = {
        str(dtype): routed(transport, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    found["ddp"] = gradients_of(transport, OWNERS, distributed_data_parallel)
    found["fsdp"] = gradients_of(transport, OWNERS, fully_sharded)
    uneven = C10dTransport(Topology(UNEVEN[0]))
    found["uneven ddp"] = gradients_of(uneven, UNEVEN[1], distributed_data_parallel)
    as_lists = {
        name: {n: v.numpy(force=True) for n, v in value.items()} if isinstance(value, dict)
        else [v.float().numpy(force=True) for v in value]
        for name, value in found.items()
    }  # fmt: skip
    results.put((rank, as_lists))
    dist.barrier()
    dist.destroy_process_group()


def receive_first(rank: int, port: int, results: Any) -> None:
    """Uneven parts, and empty ones: by :func:`all_to_all` and by torch itself."""
    start(rank, 3, port)
    sizes = [[2, 0, 5], [3, 1, 0], [0, 0, 0]]  # of the sender, by receiver
    send, receive = sizes[rank], [theirs[rank] for theirs in sizes]
    outbox = torch.arange(sum(send)) + 100 * rank
    inbox, right = torch.empty(2, sum(receive), dtype=torch.int64)
    dist.all_to_all_single(right, outbox, receive, send)
    posted, originals = [], (dist.irecv, dist.isend)
    dist.irecv = lambda *a, **k: (posted.append("receive"), originals[0](*a, **k))[1]
    dist.isend = lambda *a, **k: (posted.append("send"), originals[1](*a, **k))[1]
    all_to_all(inbox, outbox, receive, send, None)
    results.put((rank, (inbox.tolist(), right.tolist(), posted)))
    dist.barrier()
    dist.destroy_process_group()


def lose_rank_2(rank: int, port: int, results: Any, how: str, before: str) -> None:
    """Three ranks, one of which dies or stops before a call of the second exchange; what the
    others say."""
    start(rank, 3, port)
    transport = C10dTransport(Topology([2, 1]), timeout=8.0)
    exchange = ExpertExchange(transport, [0, 1, 2])
    inputs = torch.ones(1, 4), torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.ones(1, 3)
    exchange.dispatch(*inputs)
    if rank == 2:
        setattr(transport, before, lambda *_: os.kill(os.getpid(), getattr(signal, how)))
    try:
        exchange.dispatch(*inputs)
    except RuntimeError as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
        results.close()
        results.join_thread()
        os._exit(0)
