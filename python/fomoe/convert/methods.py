# SPDX-License-Identifier: Apache-2.0
"""How neurons become experts: what is compared on equal terms, one row each.

T tokens, H neurons, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe.convert.clustering import balanced_k_means
from fomoe.convert.dense import DenseLayer
from fomoe.convert.local_alignment import Report, Training, align, train_router
from fomoe.convert.router import Choice, RouterWeights

__all__ = ["METHODS", "LayerResult", "Method", "convert_layer"]

_CLUSTERED_TOKENS = 2048


@dataclass(frozen=True)
class Method:
    """``assign`` gives the expert of each neuron, or where a learned assignment starts."""

    summary: str
    assign: Callable[[DenseLayer, int, torch.Generator], Tensor | None]
    learned: bool = False  # assignment and router are trained together
    corrected: bool = True  # gradients, see local_alignment
    always_on: int = 0  # experts that every token takes
    routed: bool = True  # False: the first experts serve all tokens, the others go


class LayerResult(NamedTuple):
    """``expert`` (H,) int64, and the router of all E experts, None for a method without one."""

    expert: Tensor
    router: RouterWeights | None


def convert_layer(
    method: Method,
    layer: DenseLayer,
    num_experts: int,
    top_k: int,
    training: Training,
    report: Report | None = None,
) -> LayerResult:
    """Assign the neurons of one layer to experts and train its router."""
    generator = torch.Generator().manual_seed(training.seed)
    training = replace(training, corrected=method.corrected)
    start_H = method.assign(layer, num_experts, generator)
    if not method.routed:
        assert start_H is not None
        return LayerResult(start_H, None)
    choice = Choice(top_k, method.always_on, training.max_load)
    if method.learned:
        return LayerResult(*align(layer, num_experts, choice, training, start_H, report))
    assert start_H is not None
    products_TEE = layer.expert_products(start_H, num_experts)
    return LayerResult(start_H, train_router(layer, products_TEE, choice, training, report))


def _activation_clusters(layer: DenseLayer, num_experts: int, generator: torch.Generator) -> Tensor:
    """Neurons that are strong on the same tokens."""
    points_HT = layer.hidden[:_CLUSTERED_TOKENS].abs().T
    return balanced_k_means(points_HT, num_experts, generator)


def _weight_clusters(layer: DenseLayer, num_experts: int, generator: torch.Generator) -> Tensor:
    """Neurons with similar rows of gate and up, as LLaMA-MoE (arXiv 2406.16554) clusters them."""
    points_HP = torch.cat([layer.weights.gate, layer.weights.up], dim=1)
    return balanced_k_means(points_HP, num_experts, generator)


def _random(layer: DenseLayer, num_experts: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(layer.weights.num_neurons, generator=generator)
    return _in_turn(order, num_experts).to(layer.inputs.device)


def _tiers(layer: DenseLayer, num_experts: int, generator: torch.Generator) -> Tensor:
    """The most important neurons in expert 0, the next in expert 1, and so on."""
    return _in_turn(layer.importance.argsort(descending=True, stable=True), num_experts)


def _core(layer: DenseLayer, num_experts: int, generator: torch.Generator) -> Tensor:
    """The most important neurons in expert 0, the others clustered by activation."""
    tier_H = _tiers(layer, num_experts, generator)
    rest = (tier_H > 0).nonzero().squeeze(1)
    points_HT = layer.hidden[:_CLUSTERED_TOKENS, rest].abs().T
    expert_H = torch.zeros_like(tier_H)
    expert_H[rest] = 1 + balanced_k_means(points_HT, num_experts - 1, generator)
    return expert_H


def _none(layer: DenseLayer, num_experts: int, generator: torch.Generator) -> None:
    return None


def _in_turn(order_H: Tensor, num_experts: int) -> Tensor:
    """Expert of each neuron, when the experts fill up in that order."""
    expert_H = torch.empty_like(order_H)
    size = len(order_H) // num_experts
    expert_H[order_H] = torch.arange(len(order_H), device=order_H.device) // size
    return expert_H


METHODS = {
    "dot": Method(
        "optimal transport with corrected gradients, from a core and clusters",
        _core,
        learned=True,
    ),
    "dot-literal": Method(
        "optimal transport with the paper's straight-through gradients",
        _none,
        learned=True,
        corrected=False,
    ),
    "random": Method("neurons at random", _random),
    "weight-cluster": Method("balanced k-means of the weights", _weight_clusters),
    "activation-cluster": Method("balanced k-means of the activations", _activation_clusters),
    "core": Method("one always-on expert, the others clustered", _core, always_on=1),
    "tiers": Method("experts in order of importance", _tiers),
    "prune": Method("the most important neurons alone, no experts", _tiers, routed=False),
}
