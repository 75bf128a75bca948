# SPDX-License-Identifier: Apache-2.0
"""FoMoE in one file: federated pre-training of a mixture of experts. Read it top to bottom.

M sites, each with its own data and only a slow link to the others, train ONE model:
  ddp     every site holds the whole model; gradients are averaged at every step.
  diloco  every site trains the whole model alone for local_steps steps (a round); then an outer
          optimizer takes one step with the mean of the sites' displacements.
  fomoe   as diloco, but an expert lives on only `overlap` sites, and may move between rounds. A
          full router scores all experts; where a token picks one that is not resident (a "ghost"),
          that path is skipped: no token ever leaves its site. A partitioned one scores residents.
A codec sends displacements and steps in few bits; what it loses is added to the next round's.
All sites live in this process and a message is a copy: only the arithmetic is left, which the real
trainer must equal bit for bit. Source: FoMoE, arXiv 2606.19025v2, algorithm 1, and our choices.
Shapes: B batch, S sequence, T = B*S tokens, V = 256 bytes, D model width, F expert width, E experts
(E_router: those that the router scores), K experts per token. Run: python examples/nano_fomoe.py
"""

import hashlib
import math
import random
import re
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SETTINGS = dict(
    strategy="fomoe",  # ddp, diloco or fomoe
    outer="nesterov",  # nesterov, average or local_adamw (averages Adam's moments as well)
    codec="fp32",  # fp32 (as it is), bf16, int8 or int4
    inner="adamw",  # adamw or sgd
    router="full",  # full, or partitioned: a site has and scores its residents' rows only
    router_mean="all",  # of a full router's row: over all, over holders, or rescaled (M / holders)
    scale_expert_steps=False,  # an expert's mean displacement * sqrt(holders / M)
    sites=4,  # M
    overlap=2,  # sites per expert; only fomoe reads this and the next four
    placement="fixed",  # or random: drawn anew every shuffle_every rounds
    shuffle_every=1, full_replica_rounds=0,  # rounds at first with every expert on every site
    moved_warmup_steps=0,  # linear, of the learning rate of an expert that has come to a site
    rounds=6, local_steps=16, seed=0, dtype=torch.float32,
    lr=1e-2, warmup=16, min_ratio=0.1,  # warmup steps, linear; then a cosine from 1 to min_ratio
    betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
    clip=1.0,  # largest norm of one site's gradient; math.inf for none
    outer_lr=0.7, outer_momentum=0.9,
    dim=64, num_layers=2, num_heads=4, num_experts=8, expert_dim=128, top_k=2,
    balance_loss_coefficient=1e-2, z_loss_coefficient=1e-3,
)  # fmt: skip
FIELDS, HERE = [(k, type(v), v) for k, v in SETTINGS.items()], {"__module__": __name__}
Config = make_dataclass("Config", FIELDS, frozen=True, kw_only=True, namespace=HERE)
Result = namedtuple("Result", "parameters momenta sites losses ghost_share bytes_per_site rejected")


class MoE(nn.Module):
    def __init__(self, c: Config, resident: tuple[int, ...]) -> None:
        super().__init__()
        scored = tuple(range(c.num_experts)) if c.router == "full" else resident
        self.config, self.columns = c, [scored.index(expert) for expert in resident]
        self.router, self.experts = nn.Linear(c.dim, len(scored), bias=False), nn.Module()
        self.experts.w1 = nn.Parameter(torch.empty(len(resident), c.expert_dim, c.dim))
        self.experts.w2 = nn.Parameter(torch.empty(len(resident), c.dim, c.expert_dim))
        # Says: row i of a parameter belongs to expert_ids[i] and lives where that expert does,
        self.experts.expert_ids, self.router.expert_ids = resident, scored
        self.router.on_every_site = c.router == "full"  # or everywhere.

    def forward(self, x_BSD: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D)
        c, x = self.config, x_BSD.flatten(0, 1)  # (T, D)
        logits = self.router(x)  # (T, E_router)
        gates = logits.sigmoid()  # not normalised: a skipped expert leaves the others' gates alone
        # A stable sort, because topk promises no order among ties: the lowest expert id wins.
        chosen = logits.sort(dim=1, descending=True, stable=True).indices[:, : c.top_k]  # (T, K)
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


def tensors(model: nn.Module, of: Callable = lambda p: p) -> Iterator[tuple[str, Tensor]]:
    """Names and views of of(parameter), experts one by one: layers.3.moe.experts.17.w1 (F, D)."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(module, "expert_ids"):
                for expert, row in zip(module.expert_ids, of(parameter).detach(), strict=True):
                    yield f"{prefix}.{expert}.{name}", row
            else:
                yield f"{prefix}.{name}", of(parameter).detach()


def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Draw each tensor from its own name: sites agree on it without a message."""
    for name, tensor in tensors(model):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        noise = torch.randn(tensor.shape, generator=generator) * (1 / math.sqrt(tensor.shape[-1]))
        tensor.copy_(torch.ones(()) if name.endswith("norm.weight") else noise)
    return model


def assemble(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Give a model its parameters; Model(config) holds every expert and skips nothing."""
    for name, tensor in tensors(model):
        tensor.copy_(parameters[name])
    return model


def placement(c: Config, t: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """(layer, expert) -> the sites, ascending, that hold it in round t. All hold equally many."""
    everywhere = c.strategy != "fomoe" or t < c.full_replica_rounds
    o, draw = c.sites if everywhere else c.overlap, (t - c.full_replica_rounds) // c.shuffle_every
    if not 1 <= o <= c.sites or c.num_experts * o % c.sites:
        raise ValueError(f"overlap {o}: need 1..sites, and num_experts * overlap % sites == 0")
    table = {}
    for i in range(c.num_layers):
        rng, load = random.Random(f"{c.seed}:placement:{draw}:{i}"), Counter()
        for e in sorted(range(c.num_experts), key=lambda _: rng.random()):
            order = [(e * o + i + j) % c.sites for j in range(c.sites)]
            if c.placement == "random":  # shuffled, and then those first that hold fewest so far
                order = sorted(range(c.sites), key=lambda _: rng.random())
                order.sort(key=load.__getitem__)
            table[i, e] = tuple(sorted(order[:o]))
            load.update(table[i, e])
    return dict(sorted(table.items()))


def residents(c: Config, site: int, t: int = 0) -> tuple[tuple[int, ...], ...]:
    """A site's experts per layer in round t, ascending."""
    table, experts = placement(c, t), range(c.num_experts)
    return tuple(tuple(e for e in experts if site in table[i, e]) for i in range(c.num_layers))


def encode_decode(x: Tensor, codec: str) -> tuple[Tensor, int]:
    """What arrives of x, and the bytes on the way. Integers: 128 elements share a scale."""
    if codec in ("fp32", "bf16"):
        return (x, x.nbytes) if codec == "fp32" else (x.bfloat16().float(), 2 * x.numel())
    largest, block_bytes = {"int8": (127, 4 + 128), "int4": (7, 4 + 64)}[codec]
    blocks = F.pad(x.flatten(), (0, -x.numel() % 128)).view(-1, 128)
    scale = blocks.abs().amax(dim=1, keepdim=True) / largest
    y = ((blocks / scale).round().clamp(-largest, largest) * scale).where(scale != 0, 0.0)
    return y.flatten()[: x.numel()].view_as(x), len(blocks) * block_bytes


def expert_of(name: str) -> tuple[int, ...]:
    """layers.3.moe.experts.17.w1 -> (3, 17); the name of a shared tensor has no second number."""
    return tuple(map(int, re.findall(r"\d+", name)))[:2]


def exchange(given: list[tuple[Tensor, float]]) -> Tensor:
    """(sum of n_i x_i) / (sum of n_i) over sites in order; a single x is copied. Our choice."""
    first, *rest = [x * n for x, n in given]
    return sum(rest, first) / sum(n for _, n in given) if rest else given[0][0].clone()


def meet(c: Config, views: list[dict], start: dict, table: dict, tokens: list[float],
         failed: set[int], momenta: dict, lost: dict) -> int:  # fmt: skip
    """Every site's values become their mean, or start minus an outer step. Returns the traffic."""
    averages, traffic = c.strategy == "ddp" or (c.outer != "nesterov" and c.codec == "fp32"), 0
    failed |= {s for s, x in enumerate(views) if not all(y.isfinite().all() for y in x.values())}
    if len(failed) == c.sites:
        raise ValueError("no site is left whose values are finite")
    for n in dict.fromkeys(n for view in views for n in view):
        rows = {s: view[n] for s, view in enumerate(views) if n in view}
        holders, given, size = table.get(expert_of(n), tuple(rows)), [], 0
        for s in holders if c.router_mean == "holders" else rows:
            offer = rows[s] if averages else start[n] - rows[s] + lost[s, n]
            sent, size = encode_decode(offer, c.codec)
            traffic += size
            if s not in failed:
                given.append((sent, tokens[s]))
                lost[s, n] = offer - sent
        if given:
            new = exchange(given)
            if not averages:
                if c.scale_expert_steps and len(rows) == len(holders):
                    new = new * math.sqrt(len(holders) / c.sites)
                if c.router_mean == "rescaled":  # only rows of the full router have more rows
                    new = new * (len(rows) / len(holders))
                if c.outer == "nesterov":
                    momenta[n] = momenta.get(n, 0.0) * c.outer_momentum + new
                    new = (new + momenta[n] * c.outer_momentum) * c.outer_lr
                step = new + lost[n]
                sent, _ = encode_decode(step, c.codec)
                lost[n], new = step - sent, start[n] - sent
        for x in rows.values():
            x.copy_(new if given else start.get(n, x))
        traffic += size * (len(rows) - 2)  # an owner's messages to itself cross no link
    return traffic


def train(c: Config, batches: Callable, model_factory: Callable = Model) -> Result:
    """batches(site, step) -> (B, S + 1) int64; model_factory(config, resident): as Model."""
    values = dict(tensors(initialize(model_factory(c, None).to(c.dtype), c.seed)))
    adamw, kinds = {"betas": c.betas, "eps": c.eps}, ("exp_avg", "exp_avg_sq")
    make, options = {"adamw": (torch.optim.AdamW, adamw), "sgd": (torch.optim.SGD, {})}[c.inner]
    options |= {"weight_decay": c.weight_decay, "foreach": False, "fused": False}
    state, age = defaultdict(dict), defaultdict(lambda: math.inf)  # by (site, name): AdamW's, steps
    sites, owner, momenta, lost, history = [(None, {})] * c.sites, {}, {}, defaultdict(float), []
    for t in range(c.rounds):
        table, old, owner, traffic = placement(c, t), owner, {}, 0
        for expert, holders in table.items():  # it averages, and keeps the momentum
            owner[expert] = min(holders, key=[*owner.values()].count)
        for s, (_, before) in enumerate(sites):
            model = assemble(model_factory(c, residents(c, s, t)).to(c.dtype), values)
            sites[s] = model, dict(tensors(model))
            for n in sites[s][1].keys() - before.keys() if t else ():  # fetched
                state[s, n], age[s, n], lost[s, n] = {}, 0, 0.0
                traffic += values[n].nbytes
        for n in values:
            if t and old.get(expert_of(n)) != owner.get(expert_of(n)):
                lost[n] = 0.0
                traffic += momenta[n].nbytes if n in momenta else 0
        losses, rejected, failed, tokens = [], set(), set(), [0.0] * c.sites
        for step in range(t * c.local_steps, (t + 1) * c.local_steps):
            for s, (model, _) in enumerate(sites):
                if s not in failed:
                    model.zero_grad()
                    batch = batches(s, step)
                    logits, labels = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
                    loss, moes = F.cross_entropy(logits, labels), [x.moe for x in model.layers]
                    (loss + sum(moe.auxiliary_loss for moe in moes)).backward()
                    tokens[s] += labels.numel()
                    losses.append((loss.item(), sum(moe.ghost_share for moe in moes) / len(moes)))
                    failed |= set() if loss.isfinite() else {s}
            if c.strategy == "ddp":
                gradients = [dict(tensors(model, lambda p: p.grad)) for model, _ in sites]
                traffic += meet(c, gradients, {}, table, tokens, failed, momenta, lost)
                rejected, failed, tokens = rejected | failed, set(), [0.0] * c.sites
            progress = (step - c.warmup) / max(1, c.rounds * c.local_steps - c.warmup)
            decay = c.min_ratio + (1 - c.min_ratio) * (1 + math.cos(math.pi * progress)) / 2
            lr = c.lr * ((step + 1) / c.warmup if step < c.warmup else decay)
            for s, (model, views) in enumerate(sites):
                if s not in failed:
                    nn.utils.clip_grad_norm_(model.parameters(), c.clip)
                    for n, gradient in tensors(model, lambda p: p.grad):
                        age[s, n] += 1
                        warm = min(1, age[s, n] / max(1, c.moved_warmup_steps))
                        optimizer = make([views[n]], lr=lr * warm, **options)
                        optimizer.state[views[n]], views[n].grad = state[s, n], gradient
                        optimizer.step()
        if c.strategy != "ddp":
            views = [dict(x) for _, x in sites]
            for s, n in state if c.outer == "local_adamw" else ():
                if n in views[s]:
                    views[s] |= {f"{k}/{n}": state[s, n][k] for k in kinds}
            traffic += meet(c, views, values, table, tokens, failed, momenta, lost)
            for s, n in state:
                if s in failed and not all(x.isfinite().all() for x in state[s, n].values()):
                    state[s, n].clear()
        values = {n: x for _, views in sites for n, x in views.items()}
        means = torch.tensor(losses, dtype=torch.float64).mean(dim=0).tolist()
        history.append((*means, traffic / c.sites, tuple(sorted(rejected | failed))))
    sites = [(model, {n: state[s, n] for n in views}) for s, (model, views) in enumerate(sites)]
    return Result(values, momenta, sites, *map(list, zip(*history, strict=True)))


if __name__ == "__main__":
    windows = torch.tensor(list("".join(topics.values()).encode())).unfold(0, 65, 64)  # (N, S + 1)
    held_out, seen = windows[::60], windows[torch.arange(len(windows)) % 60 > 0]
    print("strategy   assembled loss   bytes per site and round   ghost share")
    for name in ("ddp", "diloco", "fomoe"):
        c = Config(strategy=name)
        run = train(
            c, lambda s, step: seen[random.Random(f"{s} {step}").sample(range(len(seen)), 8)]
        )
        logits = assemble(Model(c), run.parameters)(held_out[:, :-1]).flatten(0, 1)
        loss, ghosts = F.cross_entropy(logits, held_out[:, 1:].flatten()), run.ghost_share[-1]
        print(f"{name:8}{loss:17.4f}{run.bytes_per_site[-1]:27,.0f}{ghosts:14.1%}")
