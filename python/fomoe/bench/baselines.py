# SPDX-License-Identifier: Apache-2.0
"""The layer as fomoe, Hugging Face transformers and plain torch compute it, with equal weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.bench.contender import Contender
from fomoe.bench.shapes import Shape
from fomoe.bench.third_party import Weights, choose
from fomoe.nn import MoE, MoEConfig, initialize

OURS = "fomoe"
HUGGING_FACE = ("eager", "grouped_mm")
_CPU = torch.device("cpu")
HOW_TO_GET_HUGGING_FACE = (
    "Without the Hugging Face block: transformers 5 is not installed (pip install 'fomoe[hf]')."
)


def build_contenders(
    shape: Shape,
    dtype: torch.dtype,
    *,
    device: torch.device = _CPU,
    of_gpus: bool | None = None,
    seed: int = 0,
) -> dict[str, Contender]:
    """The contenders by name, ours first; without Hugging Face's when transformers is missing.

    With ``of_gpus``, by default on a GPU, there are two more in plain torch, which are not worth
    their time on a CPU: ``torch_gather``, which adds up an expert's rows without atomics, and
    ``torch_loop``, a product for each expert. All have softmax scores over all experts,
    renormalised over the chosen K, and SwiGLU experts.
    """
    with device:
        moe = MoE(
            MoEConfig(
                dim=shape.dim,
                expert_dim=shape.expert_dim,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                renormalize=True,
            )
        )
    moe.to(device, dtype)
    if device.type == "cpu":
        initialize(moe, seed)
    else:  # where drawing billions of numbers on the CPU would take longest
        generator = torch.Generator(device).manual_seed(seed)
        for parameter in moe.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    weights = (moe.router.weight, moe.experts.w1, moe.experts.w2)
    contenders = {OURS: Contender(moe, weights)}
    for name, module in PLAIN_TORCH.items():
        if name == "torch" or (device.type == "cuda" if of_gpus is None else of_gpus):
            plain = module(*weights, top_k=shape.top_k)
            contenders[name] = Contender(plain, (plain.router, plain.w1, plain.w2))
    block = hugging_face_block()
    for implementation in HUGGING_FACE if block else ():
        contenders[f"hf_{implementation}"] = _hugging_face(block, implementation, shape, weights)
    return contenders


class _PlainTorch(nn.Module):
    def __init__(self, router: Tensor, w1: Tensor, w2: Tensor, *, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(router.detach().clone())
        self.w1 = nn.Parameter(w1.detach().clone())
        self.w2 = nn.Parameter(w2.detach().clone())


class GroupedMM(_PlainTorch):
    """The least plain torch needs: F.grouped_mm between index_select and index_add.

    Of the ways to weigh and add up the experts' rows that were tried (index_add, sum over the
    inversely permuted rows, bmm with them), the fastest on CPUs; the weights go where a row is
    narrowest.
    """

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = choose(x_TD, self.router, self.top_k)
        slots_R, offsets = group_by_expert(ids_TK, self.router.shape[0])
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


class GroupedMMGather(_PlainTorch):
    """The same, but every token gathers its rows and adds them up in a product with its weights."""

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = choose(x_TD, self.router, self.top_k)
        slots_R, offsets = group_by_expert(ids_TK, self.router.shape[0])
        rows = x_TD.index_select(0, slots_R // self.top_k)
        gate, up = F.grouped_mm(rows, self.w1.mT, offs=offsets).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offsets)
        rows_of_slots = out.index_select(0, slots_R.argsort())
        return (weights_TK[:, None] @ rows_of_slots.view(*weights_TK.shape, -1))[:, 0]


class Loop(_PlainTorch):
    """A torch.mm for every expert and product, which on a GPU is one of cuBLAS.

    The host has to know how many rows each expert has: it waits for the GPU.
    """

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = choose(x_TD, self.router, self.top_k)
        slots_R, offsets = group_by_expert(ids_TK, self.router.shape[0])
        tokens_R = slots_R // self.top_k
        ends = offsets.tolist()
        counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        outs = []
        for rows, w1, w2 in zip(
            torch.split(x_TD.index_select(0, tokens_R), counts),
            self.w1.unbind(),
            self.w2.unbind(),
            strict=True,
        ):
            gate, up = (rows @ w1.mT).chunk(2, dim=-1)
            outs.append((F.silu(gate) * up) @ w2.mT)
        out = torch.cat(outs) * weights_TK.flatten().index_select(0, slots_R)[:, None]
        return torch.zeros_like(x_TD).index_add(0, tokens_R, out)


PLAIN_TORCH = {"torch": GroupedMM, "torch_gather": GroupedMMGather, "torch_loop": Loop}


def group_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots (R,) by expert, and where each expert's end (E,) int32."""
    ids_S = ids_TK.flatten()
    if ids_S.is_cuda:
        return _group_on_gpu(ids_S, num_experts)
    counts = torch.bincount(ids_S, minlength=num_experts)
    return ids_S.argsort(), counts.cumsum(0, dtype=torch.int32)


def _group_on_gpu(ids_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The same without a bincount, which would wait for the GPU."""
    sorted_ids, slots_R = ids_S.sort()
    experts = torch.arange(num_experts, device=ids_S.device)
    return slots_R, torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)


def hugging_face_block() -> Any:
    """The (configuration, block) classes of Qwen3-MoE, or None without transformers 5."""
    try:
        import transformers.integrations.moe  # noqa: F401  only version 5 has it
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return None
    return Qwen3MoeConfig, Qwen3MoeSparseMoeBlock


def _hugging_face(classes: Any, implementation: str, shape: Shape, weights: Weights) -> Contender:
    config_class, block_class = classes
    config = config_class(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.expert_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = block_class(config).to(weights[0].device, weights[0].dtype)
    parameters = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)

    def forward(x_TD: Tensor) -> Tensor:
        y: Tensor = block(x_TD.view(1, *x_TD.shape))
        return y.view(x_TD.shape)

    return Contender(forward, parameters)
