# SPDX-License-Identifier: Apache-2.0
"""fomoe in a model of your own, as a layer and op by op; seconds on a CPU.

``Block`` is plain PyTorch around any feed-forward: first ``fomoe.MoE``, then ``OwnMoE``, which
calls the ops itself on parameters of its own. Both learn a sentence. An argument names a backend of
torch.compile: ``python examples/your_model.py inductor``.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomoe
from fomoe.ops import expert_mlp, route, topk_gate

D, H, E, K = 32, 48, 8, 2  # model width, expert width, experts, experts per token
TEXT = torch.tensor(list(b"the quick brown fox jumps over the lazy dog; " * 8))


class Block(nn.Module):
    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D) for _ in range(2))
        self.attention = nn.MultiheadAttention(D, num_heads=2, bias=False, batch_first=True)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        q, mask = self.norms[0](x), nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(q, q, q, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.feed_forward(self.norms[1](x))


class OwnMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.gate_up = nn.Parameter(torch.randn(E, 2 * H, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(E, D, H) / H**0.5)
        self.register_buffer("expert_map", torch.arange(E, dtype=torch.int32))  # all are here

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        choice = topk_gate(self.gate(tokens), K, renormalize=True)
        routing = route(choice.ids, self.expert_map, E)
        return expert_mlp(tokens, choice.weights, self.gate_up, self.down, routing).view_as(x)


def train(feed_forward: nn.Module, backend: str | None = None) -> list[float]:
    """The losses of 30 steps of a one-layer language model around ``feed_forward``."""
    model = nn.Sequential(nn.Embedding(256, D), Block(feed_forward), nn.Linear(D, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    forward = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    windows, losses = TEXT.unfold(0, 33, 8), []
    for _ in range(30):
        loss = F.cross_entropy(forward(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        (loss + fomoe.nn.auxiliary_loss(model)).backward()  # 0 without fomoe.MoE
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    config = fomoe.MoEConfig(dim=D, expert_dim=H, num_experts=E, top_k=K, renormalize=True)
    for name, layer in {"fomoe.MoE": fomoe.MoE(config), "own module": OwnMoE()}.items():
        losses = train(layer, *sys.argv[1:2])
        print(f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte")
