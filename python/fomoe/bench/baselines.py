# SPDX-License-Identifier: Apache-2.0
"""The layer as fomoe, Hugging Face transformers and plain torch compute it, with equal weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.bench.shapes import Shape
from fomoe.nn import MoE, MoEConfig, initialize

OURS = "fomoe"
HUGGING_FACE = ("eager", "grouped_mm")
HOW_TO_GET_HUGGING_FACE = (
    "Without the Hugging Face block: transformers 5 is not installed (pip install 'fomoe[hf]')."
)


@dataclass(slots=True, frozen=True)
class Contender:
    forward: Callable[[Tensor], Tensor]  # (T, D) -> (T, D)
    parameters: tuple[Tensor, ...]  # router (E, D), w1 (E, 2F, D), w2 (E, D, F)


def build_contenders(shape: Shape, dtype: torch.dtype, *, seed: int = 0) -> dict[str, Contender]:
    """The contenders by name, ours first; without Hugging Face's when transformers is missing.

    All have softmax scores over all experts, renormalised over the chosen K, and SwiGLU experts.
    """
    moe = MoE(
        MoEConfig(
            dim=shape.dim,
            expert_dim=shape.expert_dim,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            renormalize=True,
        )
    )
    initialize(moe, seed)
    moe.to(dtype)
    weights = (moe.router.weight, moe.experts.w1, moe.experts.w2)
    plain = GroupedMM(*weights, top_k=shape.top_k)
    contenders = {
        OURS: Contender(moe, weights),
        "torch": Contender(plain, (plain.router, plain.w1, plain.w2)),
    }
    block = hugging_face_block()
    for implementation in HUGGING_FACE if block else ():
        contenders[f"hf_{implementation}"] = _hugging_face(block, implementation, shape, weights)
    return contenders


class GroupedMM(nn.Module):
    """The least plain torch needs: F.grouped_mm between index_select and index_add.

    Of the ways to weigh and add up the experts' rows that were tried (index_add, sum over the
    inversely permuted rows, bmm with them), the fastest; the weights go where a row is narrowest.
    """

    def __init__(self, router: Tensor, w1: Tensor, w2: Tensor, *, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(router.detach().clone())
        self.w1 = nn.Parameter(w1.detach().clone())
        self.w2 = nn.Parameter(w2.detach().clone())

    def forward(self, x_TD: Tensor) -> Tensor:
        p_TE = F.softmax(F.linear(x_TD, self.router), dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = torch.topk(p_TE, self.top_k, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        ids_S = ids_TK.flatten()
        slots_R = ids_S.argsort()
        counts = torch.bincount(ids_S, minlength=self.router.shape[0])
        offsets = counts.cumsum(0, dtype=torch.int32)
        tokens_R = slots_R // self.top_k
        weights_R1 = weights_TK.flatten().index_select(0, slots_R)[:, None]

        rows = x_TD.index_select(0, tokens_R)
        gate, up = F.grouped_mm(rows, self.w1.mT, offs=offsets).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        hidden_is_narrower = hidden.shape[1] < x_TD.shape[1]
        if hidden_is_narrower:
            hidden = hidden * weights_R1
        out = F.grouped_mm(hidden, self.w2.mT, offs=offsets)
        if not hidden_is_narrower:
            out = out * weights_R1
        return torch.zeros_like(x_TD).index_add(0, tokens_R, out)


def hugging_face_block() -> Any:
    """The (configuration, block) classes of Qwen3-MoE, or None without transformers 5."""
    try:
        import transformers.integrations.moe  # noqa: F401  only version 5 has it
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return None
    return Qwen3MoeConfig, Qwen3MoeSparseMoeBlock


def _hugging_face(
    classes: Any, implementation: str, shape: Shape, weights: tuple[Tensor, ...]
) -> Contender:
    config_class, block_class = classes
    config = config_class(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.expert_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = block_class(config).to(weights[0].dtype)
    parameters = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)

    def forward(x_TD: Tensor) -> Tensor:
        y: Tensor = block(x_TD.view(1, *x_TD.shape))
        return y.view(x_TD.shape)

    return Contender(forward, parameters)
