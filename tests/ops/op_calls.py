# SPDX-License-Identifier: Apache-2.0
"""Every op with its tensors by name, for tests of what holds for all of them."""

from collections.abc import Callable

import torch
from samples import Sample, gradient_like, sum_dtype
from torch import Tensor

from fomoe import ops
from fomoe.ops import GateOutput, Routing

Call = tuple[Callable, dict[str, Tensor]]

WITHOUT_PRODUCTS = [
    "topk_gate",
    "topk_gate restricted",
    "route",
    "destinations",
    "permute",
    "combine",
    "combine without weights",
]
WITH_PRODUCTS = [
    "grouped_gemm",
    "grouped_gemm transposed",
    "expert_mlp swiglu",
    "expert_mlp silu",
    "expert_mlp swiglu_clamped",
]
ALL = WITHOUT_PRODUCTS + WITH_PRODUCTS
DIFFERENTIABLE = [name for name in ALL if name not in ("route", "destinations")]


def kernels() -> set[str]:
    """Names of the ops but those of the all-to-all, which are made of the others."""
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("fomoe::") for name in names if name.startswith("fomoe::")}
    return {name for name in ours if not name.startswith("all_to_all_")}


def call_of(name: str, sample: Sample, dtype: torch.dtype) -> Call:
    """A function of named tensors, and the tensors."""
    op, _, variant = name.partition(" ")
    return CALLS[op](sample, dtype, variant)


def topk_gate(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    tensors = {"logits": sample.logits(dtype)}
    if not variant:
        return lambda logits: ops.topk_gate(logits, sample.top_k, score="sigmoid"), tensors
    num_groups = 4 if sample.experts % 4 == 0 else sample.experts
    group_size = sample.experts // num_groups
    tensors["bias"] = sample.random(sample.experts, seed=7, dtype=sum_dtype(dtype))
    tensors["resident"] = sample.expert_map() >= 0

    def restricted(logits: Tensor, bias: Tensor, resident: Tensor) -> GateOutput:
        return ops.topk_gate(
            logits,
            sample.top_k,
            score="sigmoid",
            bias=bias,
            resident=resident,
            num_groups=num_groups,
            top_k_groups=min(num_groups, -(-sample.top_k // group_size) + 1),
            group_score="top2_sum",
            renormalize=True,
        )

    return restricted, tensors


def route(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    tensors = {"ids": sample.ids(), "expert_map": sample.expert_map()}
    experts = sample.num_local_experts
    return lambda ids, expert_map: ops.route(ids, expert_map, experts, capacity=5), tensors


def destinations(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    groups = torch.arange(sample.experts, dtype=torch.int32) % 5 - 1
    tensors = {"ids": sample.ids(), "group_of_expert": groups}
    return lambda ids, group_of_expert: ops.destinations(ids, group_of_expert, 4), tensors


def permute(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    tensors = {"x": sample.x(dtype)} | sample.routing()._asdict()
    return lambda x, **routing: ops.permute(x, Routing(**routing)), tensors


def combine(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    tensors = {"rows": sample.rows(dtype, sample.dim)} | sample.routing()._asdict()
    if variant:
        return lambda rows, **routing: ops.combine(rows, None, Routing(**routing)), tensors
    tensors["weights"] = sample.weights(dtype)
    return (
        lambda rows, weights, **routing: ops.combine(rows, weights, Routing(**routing)),
        tensors,
    )


def grouped_gemm(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    weight, offsets = sample.w1(dtype), sample.routing().offsets
    is_transposed = variant == "transposed"
    width = weight.shape[1] if is_transposed else sample.dim
    tensors = {"rows": sample.rows(dtype, width), "weight": weight, "offsets": offsets}
    return lambda **tensors: ops.grouped_gemm(**tensors, transpose_weight=is_transposed), tensors


def expert_mlp(sample: Sample, dtype: torch.dtype, variant: str) -> Call:
    layer = {
        "x": sample.x(dtype),
        "weights": sample.weights(dtype),
        "w1": sample.w1(dtype, variant),
        "w2": sample.w2(dtype),
        "b1": sample.b1(dtype, variant),
        "b2": sample.b2(dtype),
    }

    def experts(**tensors: Tensor) -> Tensor:
        routing = Routing(*(tensors.pop(name) for name in Routing._fields))
        return ops.expert_mlp(**tensors, routing=routing, activation=variant)

    return experts, layer | sample.routing()._asdict()


CALLS = {
    function.__name__: function
    for function in (
        topk_gate,
        route,
        destinations,
        permute,
        combine,
        grouped_gemm,
        expert_mlp,
    )
}


def outputs_of(function: Callable, tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the leaves that they depend on, which share the memory of the tensors."""
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return outputs, [leaf for leaf in leaves.values() if leaf.requires_grad]


def gradients_of(outputs: list[Tensor], leaves: list[Tensor], **options: bool) -> list[Tensor]:
    """Gradients of the leaves that the outputs reach."""
    smooth = [output for output in outputs if output.requires_grad]
    if not smooth:
        return []
    given = [gradient_like(output) for output in smooth]
    gradients = torch.autograd.grad(smooth, leaves, given, allow_unused=True, **options)
    return [gradient for gradient in gradients if gradient is not None]


def results_of(function: Callable, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then gradients."""
    outputs, leaves = outputs_of(function, tensors)
    return [*outputs, *gradients_of(outputs, leaves)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {index} differs"
