# SPDX-License-Identifier: Apache-2.0
"""FoMoE in one file: federated pre-training of a mixture of experts. Read it top to bottom.

M sites, each with its own data and only a slow link to the others, train ONE model:
  ddp     every site holds the whole model; gradients are averaged at every step.
  diloco  every site trains the whole model alone for local_steps steps (a round); then an outer
          optimizer takes one step with the mean of the sites' displacements.
  fomoe   as diloco, but an expert lives on only `overlap` sites. Where a token picks one that is
          not resident (a "ghost"), that path is skipped: no token ever leaves its site.
All sites live in this process and a message is a copy: only the arithmetic is left, which the real
trainer must equal bit for bit. Source: FoMoE, arXiv 2606.19025v2, algorithm 1.
Shapes: B batch, S sequence, T = B*S tokens, V = 256 bytes, D model width, F expert width, E experts
(E_router: those that the router scores), K experts per token. Run: python examples/nano_fomoe.py -h
"""

import argparse
import hashlib
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Parameters and outer momenta by tensor name; (model, inner optimizer) per site; means per round.
Result = namedtuple("Result", "parameters momenta sites losses ghost_share bytes_per_site")


@dataclass(kw_only=True, frozen=True)
class Config:
    strategy: str = "fomoe"  # ddp, diloco or fomoe
    outer: str = "nesterov"  # nesterov, average or local_adamw (averages Adam's moments as well)
    inner: str = "adamw"  # adamw or sgd
    router: str = "full"  # full, or partitioned: a site has and scores its residents' rows only
    sites: int = 4  # M
    overlap: int = 2  # sites per expert; only fomoe reads it
    rounds: int = 6
    local_steps: int = 16
    lr: float = 1e-2
    warmup: int = 16  # steps, linear; then a cosine from 1 down to min_ratio
    min_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of one site's gradient; math.inf for none
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    seed: int = 0
    dtype: torch.dtype = torch.float32
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_experts: int = 8
    expert_dim: int = 128
    top_k: int = 2
    balance_loss_coefficient: float = 1e-2
    z_loss_coefficient: float = 1e-3


class MoE(nn.Module):
    def __init__(self, c: Config, resident: tuple[int, ...]) -> None:
        super().__init__()
        scored = {"full": tuple(range(c.num_experts)), "partitioned": resident}[c.router]
        self.config, self.columns = c, [scored.index(expert) for expert in resident]
        self.router, self.experts = nn.Linear(c.dim, len(scored), bias=False), nn.Module()
        self.experts.w1 = nn.Parameter(torch.empty(len(resident), c.expert_dim, c.dim))
        self.experts.w2 = nn.Parameter(torch.empty(len(resident), c.dim, c.expert_dim))
        self.experts.expert_ids = resident  # says: row i of my parameters belongs to expert_ids[i]
        if c.router == "partitioned":
            self.router.expert_ids = resident  # then a router row lives and travels with its expert

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


def residents(c: Config, site: int) -> tuple[tuple[int, ...], ...]:
    """A site's experts per layer. Our choice: e of layer i is on sites (e*o + i + j) % M, j < o."""
    o = {"ddp": c.sites, "diloco": c.sites, "fomoe": c.overlap}[c.strategy]
    if not 1 <= o <= c.sites or c.num_experts * o % c.sites:
        raise ValueError(f"overlap {o}: need 1..sites, and num_experts * overlap % sites == 0")
    experts, layers = range(c.num_experts), range(c.num_layers)
    return tuple(tuple(e for e in experts if (site - e * o - i) % c.sites < o) for i in layers)


def exchange(views: list[dict[str, Tensor]], tokens: list[float]) -> dict[str, Tensor]:
    """Set a tensor to its mean over the sites that hold it, in order, by tokens (our choice)."""
    means = {}
    for name in dict.fromkeys(name for view in views for name in view):
        held = [(view[name], n) for view, n in zip(views, tokens, strict=True) if name in view]
        first, *rest = [x * n for x, n in held]
        means[name] = sum(rest, first) / sum(n for _, n in held) if rest else held[0][0].clone()
        for x, _ in held:
            x.copy_(means[name])
    return means


def train(c: Config, batches: Callable, model_factory: Callable = Model) -> Result:
    """batches(site, step) -> (B, S + 1) int64; model_factory(config, resident): as Model."""
    models = [model_factory(c, residents(c, site)).to(c.dtype) for site in range(c.sites)]
    now = [dict(tensors(initialize(model, c.seed))) for model in models]  # views into the models
    parameters = {name: tensor for view in now for name, tensor in view.items()}
    start = {name: tensor.clone() for name, tensor in parameters.items()}  # of the round
    adamw = {"betas": c.betas, "eps": c.eps}
    make, settings = {"adamw": (torch.optim.AdamW, adamw), "sgd": (torch.optim.SGD, {})}[c.inner]
    settings |= {"lr": c.lr, "weight_decay": c.weight_decay, "foreach": False, "fused": False}
    sites = [(model, make(model.parameters(), **settings)) for model in models]
    moments = {"nesterov": (), "average": (), "local_adamw": ("exp_avg", "exp_avg_sq")}[c.outer]
    momenta, history, steps = {}, [], c.rounds * c.local_steps
    for step in range(steps):
        if c.strategy == "ddp" or step % c.local_steps == 0:
            tokens = [0.0] * c.sites  # since the last exchange
        for site, (model, optimizer) in enumerate(sites):
            optimizer.zero_grad()
            batch = batches(site, step)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            moes = [layer.moe for layer in model.layers]
            (loss + sum(moe.auxiliary_loss for moe in moes)).backward()
            tokens[site] += batch[:, 1:].numel()
            history.append((loss.item(), sum(moe.ghost_share for moe in moes) / len(moes)))
        if c.strategy == "ddp":
            exchange([dict(tensors(model, lambda p: p.grad)) for model in models], tokens)
        progress = (step - c.warmup) / max(1, steps - c.warmup)
        decay = c.min_ratio + (1 - c.min_ratio) * (1 + math.cos(math.pi * progress)) / 2
        for model, optimizer in sites:
            nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            factor = (step + 1) / c.warmup if step < c.warmup else decay
            optimizer.param_groups[0]["lr"] = c.lr * factor
            optimizer.step()
        if c.strategy == "ddp" or (step + 1) % c.local_steps:
            continue
        if c.outer == "nesterov":
            moved = [{name: start[name] - tensor for name, tensor in view.items()} for view in now]
            for name, delta in exchange(moved, tokens).items():
                momenta[name] = momenta.get(name, 0.0) * c.outer_momentum + delta
                start[name] = start[name] - (delta + momenta[name] * c.outer_momentum) * c.outer_lr
            for model in models:
                assemble(model, start)
        else:
            exchange(now, tokens)
        for key in moments:
            adam = [dict(tensors(m, lambda p, o=o, key=key: o.state[p][key])) for m, o in sites]
            exchange(adam, tokens)
    once = [2 * (sum(n in view for view in now) - 1) * t.nbytes for n, t in parameters.items()]
    times = c.local_steps if c.strategy == "ddp" else 1 + len(moments)
    averages = torch.tensor(history, dtype=torch.float64).view(c.rounds, -1, 2).mean(dim=1).T
    return Result(parameters, momenta, sites, *averages.tolist(), times * sum(once) / c.sites)


def main() -> None:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for flag in ("outer", "router", "sites", "overlap", "rounds", "local_steps", "seed"):
        parser.add_argument(f"--{flag}", type=Config.__annotations__[flag])
    flags = vars(parser.parse_args())
    windows = torch.tensor(list("".join(topics.values()).encode())).unfold(0, 65, 64)  # (N, S + 1)
    held_out, seen = windows[::60], windows[torch.arange(len(windows)) % 60 > 0]

    def batches(site: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * step + site)
        return seen[torch.randint(len(seen), (8,), generator=generator)]

    print("strategy   assembled loss   bytes per site and round   ghost share")
    for c in (Config(strategy=name, **flags) for name in ("ddp", "diloco", "fomoe")):
        run = train(c, batches)
        logits = assemble(Model(c), run.parameters)(held_out[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()
        print(f"{c.strategy:8}{loss:17.4f}{run.bytes_per_site:27,.0f}{run.ghost_share[-1]:14.1%}")


if __name__ == "__main__":
    main()
