# SPDX-License-Identifier: Apache-2.0
"""Layers of other libraries of GPU kernels, where they are installed.

None is needed, and what a library offers changes: one that cannot be imported, does not take a
shape, or does not agree with the reference is named with the reason and left out.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.bench.contender import Contender
from fomoe.bench.shapes import Shape

Weights = tuple[Tensor, Tensor, Tensor]  # router (E, D), w1 (E, 2F, D), w2 (E, D, F)


def choose(x_TD: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights (T, K), renormalised, and ids (T, K): the least a router does in plain torch."""
    p_TE = F.softmax(F.linear(x_TD, router), dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = torch.topk(p_TE, top_k, dim=-1)
    return (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype), ids_TK


def _scattermoe(shape: Shape, weights: Weights) -> Contender:
    module: Any = import_module("scattermoe.mlp").GLUMLP(
        shape.dim, shape.expert_dim, shape.num_experts, shape.top_k, activation=nn.SiLU()
    )
    module.to(weights[0].device, weights[0].dtype)
    up_then_gate = torch.arange(2 * shape.expert_dim).roll(shape.expert_dim)
    router = nn.Parameter(weights[0].detach().clone())
    parameters = (router, module.experts.weight, module.output_experts.weight)
    _fill(parameters, weights, up_then_gate)

    def forward(x_TD: Tensor) -> Tensor:
        y: Tensor = module(x_TD, *choose(x_TD, router, shape.top_k))
        return y

    return Contender(forward, parameters, up_then_gate)


def _sonicmoe(shape: Shape, weights: Weights) -> Contender:
    library: Any = import_module("sonicmoe")
    enums: Any = import_module("sonicmoe.enums")
    module = library.MoE(
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.dim,
        intermediate_size=shape.expert_dim,
        activation_function=enums.ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to(weights[0].device, weights[0].dtype)
    gate_and_up_in_turns = torch.arange(2 * shape.expert_dim).view(2, -1).mT.flatten()
    parameters = (module.router.weight, module.c_fc.weight, module.c_proj.weight)
    _fill(parameters, weights, gate_and_up_in_turns)

    def forward(x_TD: Tensor) -> Tensor:
        y: Tensor = module(x_TD)[0]
        return y

    return Contender(forward, parameters, gate_and_up_in_turns)


def _liger(shape: Shape, weights: Weights) -> Contender:
    function: Any = import_module("liger_kernel.ops").LigerFusedMoEFunction
    parameters = tuple(nn.Parameter(weight.detach().clone()) for weight in weights)
    router, w1, w2 = parameters

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = choose(x_TD, router, shape.top_k)
        y: Tensor = function.apply(x_TD, w1, w2, ids_TK.int(), weights_TK)
        return y

    return Contender(forward, parameters)


THIRD_PARTY: dict[str, Callable[[Shape, Weights], Contender]] = {
    "scattermoe": _scattermoe,
    "sonicmoe": _sonicmoe,
    "liger": _liger,
}


def build_third_party(
    shape: Shape, weights: Weights
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can be had by name, and of the others why not."""
    contenders, missing = {}, {}
    for name, build in THIRD_PARTY.items():
        try:
            contenders[name] = build(shape, weights)
        except ImportError:
            missing[name] = "not installed"
        except Exception as error:  # foreign code may fail in any way
            missing[name] = first_line(error)
    return contenders, missing


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@torch.no_grad()
def _fill(parameters: tuple[Tensor, ...], weights: Weights, w1_rows: Tensor) -> None:
    router, w1, w2 = weights
    for parameter, weight in zip(
        parameters, (router, w1[:, w1_rows.to(w1.device)], w2), strict=True
    ):
        parameter.copy_(weight)
