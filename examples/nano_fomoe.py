# SPDX-License-Identifier: Apache-2.0
# fmt: off
"""FoMoE in one file: federated pre-training of a mixture of experts. Read it top to bottom.

M sites, each with its own data and only a slow link to the others, train ONE model:
  ddp     every site holds the whole model; gradients are averaged at every step.
  diloco  every site trains the whole model alone for local_steps steps (a round); then an outer
          optimizer takes one step with the mean of the sites' displacements.
  fomoe   as diloco, but an expert lives on only `overlap` sites, and may move between rounds. A
          full router scores all experts; where a token picks one that is not resident (a "ghost"),
          that path is skipped: no token ever leaves its site. A partitioned one scores residents.
A codec sends displacements and outer steps in few bits; what it loses is sent a round later. Here
a message is a copy: only the arithmetic is left, which the real trainer must equal bit for bit.
Source: FoMoE, arXiv 2606.19025v2, algorithm 1, and our choices. B batch, S sequence, T = B*S,
V = 256 bytes, D model width, F expert width, E experts (E_router: scored ones), K per token.
"""

import hashlib
import math
import random
from collections import Counter, defaultdict, namedtuple
from dataclasses import make_dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = make_dataclass("Config", [(key, type(value), value) for key, value in dict(
    strategy="fomoe",  # ddp, diloco or fomoe
    outer="nesterov",  # nesterov, average or local_adamw (averages Adam's moments as well)
    router="full",  # full, or partitioned: a site has and scores its residents' rows only
    router_mean="all",  # of a full router's row: over all, over holders, or rescaled: all * M / o
    scale_expert_steps=False,  # an expert's mean displacement * sqrt(o / M)
    sites=4, overlap=2,  # M; o, sites per expert, which as the next four only fomoe reads
    placement="fixed", shuffle_every=1,  # or random: drawn anew every so many rounds
    full_replica_rounds=0, moved_warmup_steps=0,  # all experts everywhere at first; of moved ones
    inner="adamw", codec="fp32",  # or sgd; fp32 (as it is), bf16, int8 or int4
    outer_lr=0.7, outer_momentum=0.9, rounds=6, local_steps=16, seed=0, dtype=torch.float32,
    lr=1e-2, warmup=16, min_ratio=0.1,  # warmup steps, linear; then a cosine from 1 to min_ratio
    betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=1.0,  # largest norm of a site's gradient
    dim=64, num_layers=2, num_heads=4, num_experts=8, expert_dim=128, top_k=2,
    balance_loss_coefficient=1e-2, z_loss_coefficient=1e-3,
).items()], frozen=True, kw_only=True, namespace={"__module__": __name__})
Result = namedtuple("Result", "parameters momenta sites losses ghost_share bytes_per_site rejected")

class MoE(nn.Module):
    def __init__(self, c: Config, resident: tuple[int, ...]) -> None:
        super().__init__()
        scored = tuple(range(c.num_experts)) if c.router == "full" else resident
        self.config, self.columns = c, [scored.index(expert) for expert in resident]
        self.router = nn.Linear(c.dim, len(scored), bias=False)
        w1, w2 = (len(resident), c.expert_dim, c.dim), (len(resident), c.dim, c.expert_dim)
        self.experts = nn.ParameterDict({"w1": torch.empty(w1), "w2": torch.empty(w2)})
        self.experts.expert_ids, self.router.expert_ids = resident, scored  # row i: of expert [i]
        self.router.on_every_site = c.router == "full"  # or a row is where its expert is

    def forward(self, x_BSD: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        c, x = self.config, x_BSD.flatten(0, 1)  # (T, D)
        logits = self.router(x)  # (T, E_router)
        gates = logits.sigmoid()  # not normalised: a skipped expert leaves the others' gates alone
        chosen = logits.sort(descending=True, stable=True).indices[:, : c.top_k]  # ties: lowest id
        y = torch.zeros_like(x)
        for column, w1, w2 in zip(self.columns, self.experts.w1, self.experts.w2, strict=True):
            token = (chosen == column).any(dim=1).nonzero().squeeze(1)
            y = y.index_add(0, token, gates[token, column, None] * (F.silu(x[token] @ w1.T) @ w2.T))
        counts = chosen.flatten().bincount(minlength=logits.shape[1])  # (E_router)
        self.ghost_share = 1 - counts[self.columns].sum().item() / chosen.numel()
        probability = (gates / gates.sum(dim=1, keepdim=True)).sum(dim=0) / len(x)
        balance = logits.shape[1] * (counts / chosen.numel() * probability).sum()
        z = logits.logsumexp(dim=1).square().sum() / len(x)  # z and balance: our choice
        self.auxiliary_loss = c.balance_loss_coefficient * balance + c.z_loss_coefficient * z
        return y.view_as(x_BSD)

def attention(x: Tensor, heads: int, query, key, value, output) -> Tensor:  # (B, S, D), causal
    q, k, v = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (query, key, value))
    exponent = torch.arange(0, q.shape[-1], 2, dtype=x.dtype) / q.shape[-1]
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 10000.0**-exponent  # (S, d / 2)
    cos, sin, halves = angle.cos(), angle.sin(), [y.chunk(2, dim=-1) for y in (q, k)]
    q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1) for a, b in halves)  # RoPE
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, S, d)
    return output(y.transpose(1, 2).flatten(2))

class Model(nn.Module):  # a decoder with tied embeddings
    def __init__(self, c: Config, resident: tuple[tuple[int, ...], ...] | None = None) -> None:
        super().__init__()  # resident: expert ids per layer; None: all of them
        self.embedding, self.embedding_norm = nn.Embedding(256, c.dim), nn.RMSNorm(c.dim, 1e-6)
        self.heads, self.layers = c.num_heads, nn.ModuleList()
        for expert_ids in resident or (tuple(range(c.num_experts)),) * c.num_layers:
            layer, names = nn.Module(), ("query", "key", "value", "output")
            layer.attention_norm = nn.RMSNorm(c.dim, 1e-6)
            layer.attention = nn.ModuleDict({n: nn.Linear(c.dim, c.dim, False) for n in names})
            layer.attention_output_norm = nn.RMSNorm(c.dim, 1e-6)
            layer.moe_norm, layer.moe = nn.RMSNorm(c.dim, 1e-6), MoE(c, expert_ids)
            layer.moe_output_norm = nn.RMSNorm(c.dim, 1e-6)
            self.layers.append(layer)
        self.norm = nn.RMSNorm(c.dim, 1e-6)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, S) int64 -> (B, S, V)
        x = self.embedding_norm(self.embedding(tokens))  # (B, S, D)
        for layer in self.layers:  # Peri-LN: a norm before and after each block
            y = attention(layer.attention_norm(x), self.heads, **layer.attention)
            x = x + layer.attention_output_norm(y)
            x = x + layer.moe_output_norm(layer.moe(layer.moe_norm(x)))
        return F.linear(self.norm(x), self.embedding.weight)

def tensors(model: nn.Module, of=lambda parameter: parameter):
    """Names and views of of(parameter), experts one by one: layers.3.moe.experts.17.w1 (F, D)."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            x, ids = of(parameter).detach(), getattr(module, "expert_ids", None)
            rows = {path: x} if ids is None else {f"{path}.{e}": x[i] for i, e in enumerate(ids)}
            yield from ((f"{prefix}.{name}", row) for prefix, row in rows.items())

def initialize(model: nn.Module, seed: int) -> nn.Module:  # every site alike, without a message
    for name, tensor in tensors(model):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        noise = torch.randn(tensor.shape, generator=generator) * (1 / math.sqrt(tensor.shape[-1]))
        tensor.copy_(torch.ones(()) if name.endswith("norm.weight") else noise)
    return model

def assemble(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    for name, tensor in tensors(model):
        tensor.copy_(parameters[name])
    return model

def placement(c: Config, t: int = 0) -> dict[tuple[int, int], tuple[int, ...]]:
    """(layer, expert) -> the sites, ascending, that hold it in round t. All hold equally many."""
    everywhere, table = c.strategy != "fomoe" or t < c.full_replica_rounds, {}
    o, draw = c.sites if everywhere else c.overlap, (t - c.full_replica_rounds) // c.shuffle_every
    if not 1 <= o <= c.sites or c.num_experts * o % c.sites:
        raise ValueError(f"overlap {o}: need 1..sites, and num_experts * overlap % sites == 0")
    for i in range(c.num_layers):
        rng, load = random.Random(f"{c.seed}:placement:{draw}:{i}"), Counter()
        for e in sorted(range(c.num_experts), key=lambda _: rng.random()):
            order = [(e * o + i + j) % c.sites for j in range(c.sites)]
            if c.placement == "random":  # those that hold fewest so far, at random among equals
                order = sorted(range(c.sites), key=lambda s: (load[s], rng.random()))
            table[i, e] = tuple(sorted(order[:o]))
            load.update(table[i, e])
    return dict(sorted(table.items()))

def encode_decode(x: Tensor, codec: str) -> tuple[Tensor, int]:
    """What arrives of x, and the bytes on the way. Integers: 128 elements share a scale."""
    if codec in ("fp32", "bf16"):
        return (x, x.nbytes) if codec == "fp32" else (x.bfloat16().float(), 2 * x.numel())
    largest, block_bytes = {"int8": (127, 4 + 128), "int4": (7, 4 + 64)}[codec]
    blocks = F.pad(x.flatten(), (0, -x.numel() % 128)).view(-1, 128)
    scale = blocks.abs().amax(dim=1, keepdim=True) / largest
    y = ((blocks / scale).round().clamp(-largest, largest) * scale).where(scale != 0, 0.0)
    return y.flatten()[: x.numel()].view_as(x), len(blocks) * block_bytes

def exchange(c, views, tokens, failed, start, holders, momenta, lost) -> int:
    """Every site's values become their mean, or start less an outer step. Returns the traffic."""
    averages, traffic = c.strategy == "ddp" or (c.outer != "nesterov" and c.codec == "fp32"), 0
    failed |= {s for s, x in enumerate(views) if not all(y.isfinite().all() for y in x.values())}
    assert len(failed) < len(views), "no site is left whose values are finite"
    for n in dict.fromkeys(n for view in views for n in view):
        rows, given = {s: view[n] for s, view in enumerate(views) if n in view}, []
        h = len(holders[n.split("/")[-1]])  # less than rows: a row of the full router, with ghosts
        for s in holders[n.split("/")[-1]] if c.router_mean == "holders" else rows:
            offer = rows[s] if averages else start[n] - rows[s] + lost[s, n]
            sent, size = encode_decode(offer, c.codec)
            traffic += size
            if s not in failed:
                lost[s, n] = offer - sent
                given.append((sent, tokens[s]))
        traffic += size * (len(rows) - 2)  # the owner's messages to itself cross no link
        if given:
            first, *rest = [x * k for x, k in given]  # in order of sites, by tokens: our choice
            new = sum(rest, first) / sum(k for _, k in given) if rest else given[0][0].clone()
        if given and not averages:
            new = new * (len(rows) / h if c.router_mean == "rescaled" else 1)
            new = new * (math.sqrt(h / c.sites) if c.scale_expert_steps and len(rows) == h else 1)
            if c.outer == "nesterov":
                momenta[n] = momenta.get(n, 0.0) * c.outer_momentum + new
                new = (new + momenta[n] * c.outer_momentum) * c.outer_lr
            sent, _ = encode_decode(new + lost[n], c.codec)
            lost[n], new = new + lost[n] - sent, start[n] - sent
        for x in rows.values():
            x.copy_(new if given else start.get(n, x))
    return traffic

def train(c: Config, batches, model_factory=Model) -> Result:
    """batches(site, step) -> (B, S + 1) int64. state (AdamW's), lost, age: by (site, name)."""
    values = dict(tensors(initialize(model_factory(c, None).to(c.dtype), c.seed)))
    expert = {n: tuple(int(part) for part in n.split(".") if part.isdigit()) for n in values}
    more = {"betas": c.betas, "eps": c.eps} if c.inner == "adamw" else {}
    make = torch.optim.AdamW if more else torch.optim.SGD
    models, views, owner, momenta, history = [None] * c.sites, [{}] * c.sites, {}, {}, []
    state, lost, age = defaultdict(dict), defaultdict(float), defaultdict(lambda: math.inf)
    for t in range(c.rounds):
        grid, old, owner, traffic = placement(c, t), owner, {}, 0
        for place, sites in grid.items():  # the owner averages, and keeps the momentum
            owner[place] = min(sites, key=[*owner.values()].count)
        holders = {n: grid.get(expert[n], range(c.sites)) for n in values}
        for s, before in enumerate(views):  # experts move: weights travel, AdamW starts anew
            held = [[e for j, e in grid if j == i and s in grid[j, e]] for i in range(c.num_layers)]
            models[s] = assemble(model_factory(c, held).to(c.dtype), values)
            views[s] = dict(tensors(models[s]))
            for n in views[s].keys() - before.keys() if t else ():
                state[s, n], age[s, n], lost[s, n] = {}, 0, 0.0
                traffic += values[n].nbytes
        for n in (n for n in values if t and old.get(expert[n]) != owner.get(expert[n])):
            lost[n] = 0.0
            traffic += values[n].nbytes * (n in momenta)
        losses, rejected, failed, tokens = [], set(), set(), [0.0] * c.sites
        for step in range(t * c.local_steps, (t + 1) * c.local_steps):
            for s in sorted({*range(c.sites)} - failed):
                models[s].zero_grad()
                batch, moes = batches(s, step), [layer.moe for layer in models[s].layers]
                logits, labels = models[s](batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
                loss = F.cross_entropy(logits, labels)
                (loss + sum(moe.auxiliary_loss for moe in moes)).backward()
                losses.append((loss.item(), sum(moe.ghost_share for moe in moes) / len(moes)))
                tokens[s] += labels.numel()
                failed |= set() if loss.isfinite() else {s}
            if c.strategy == "ddp":
                gradients = [dict(tensors(model, lambda p: p.grad)) for model in models]
                traffic += exchange(c, gradients, tokens, failed, {}, holders, momenta, lost)
                rejected, failed, tokens = rejected | failed, set(), [0.0] * c.sites
            progress = (step - c.warmup) / max(1, c.rounds * c.local_steps - c.warmup)
            decay = c.min_ratio + (1 - c.min_ratio) * (1 + math.cos(math.pi * progress)) / 2
            lr = c.lr * ((step + 1) / c.warmup if step < c.warmup else decay)
            for s in sorted({*range(c.sites)} - failed):
                nn.utils.clip_grad_norm_(models[s].parameters(), c.clip)
                for n, gradient in tensors(models[s], lambda p: p.grad):
                    x, age[s, n] = views[s][n], age[s, n] + 1
                    warm = min(1, age[s, n] / max(1, c.moved_warmup_steps))
                    inner = make([x], lr * warm, weight_decay=c.weight_decay, foreach=False, **more)
                    inner.state[x], x.grad = state[s, n], gradient
                    inner.step()
        if c.strategy != "ddp":
            offers = [view | {f"{k}/{n}": x for n in view for k, x in state[s, n].items()
                      if c.outer == "local_adamw" and k != "step"} for s, view in enumerate(views)]
            traffic += exchange(c, offers, tokens, failed, values, holders, momenta, lost)
            for (s, _), y in state.items():
                if s in failed and not all(x.isfinite().all() for x in y.values()):
                    y.clear()
        values = {n: x for view in views for n, x in view.items()}
        means = torch.tensor(losses, dtype=torch.float64).mean(dim=0).tolist()
        history.append((*means, traffic / c.sites, tuple(sorted(rejected | failed))))
    sites = [(models[s], {n: state[s, n] for n in views[s]}) for s in range(c.sites)]  # of AdamW
    return Result(values, momenta, sites, *map(list, zip(*history, strict=True)))

if __name__ == "__main__":
    text = torch.tensor(list("".join(topics.values()).encode())).unfold(0, 65, 64)  # (N, S + 1)
    for name in ("ddp", "diloco", "fomoe"):
        print(name, *train(Config(strategy=name), lambda s, t: text[8 * (4 * t + s) :][:8])[3:])
