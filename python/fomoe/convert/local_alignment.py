# SPDX-License-Identifier: Apache-2.0
"""Learn, for one layer, which neurons form an expert and which experts a token takes.

The loss is the squared error of the layer's own output over its squared length: no other layer is
needed, so layers are aligned one by one, each on the inputs it has in the dense model.

A hard 0/1 mask makes the straight-through gradient of DOT-MoE (arXiv 2606.01666) one-sided: the
error is what the switched-off neurons would have added, so the gradient pulls on them and is near
zero for those that are on, which nothing defends. As the loss is quadratic, the difference
between *on* and *off* is known exactly and costs no more, and that is what ``corrected`` uses:

    neuron:  gradient + q_i (1 - 2 m_i),            q_i = h_i^2 |down_i|^2
    expert:  sum of its gradients + |C_e|^2 (1 - 2 R_e),  C_e = sum over its neurons of h_i down_i

T tokens, D model width, H neurons, E experts, F neurons of an expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe.convert.dense import DenseLayer, DenseWeights
from fomoe.convert.rounding import greedy_rounding
from fomoe.convert.router import (
    Choice,
    RouterWeights,
    ScaledRouter,
    cost_sensitive_loss,
    limited,
    straight_through_loss,
)
from fomoe.convert.schedule import (
    BETAS,
    LAST_TEMPERATURE,
    WEIGHT_DECAY,
    batches,
    learning_rate_factor,
    temperature,
)
from fomoe.convert.sinkhorn import sinkhorn

BALANCE = 1e-2  # of the paper's losses, for the straight-through router
Z = 1e-3


@dataclass(kw_only=True, slots=True, frozen=True)
class Training:
    """How long and how fast one layer is trained; the defaults were chosen on four layers."""

    steps: int = 64
    batch_size: int = 1024
    affinity_rate: float = 0.03
    router_rate: float = 0.01
    affinity_of_start: float = 0.15  # of a neuron to the expert it starts in
    corrected: bool = True  # False: the paper's gradients
    max_load: float | None = None  # see Choice
    seed: int = 0


class Progress(NamedTuple):
    """One training step: its loss, and the mean entropy of a neuron's soft assignment (nats)."""

    step: int
    loss: float
    assignment_entropy: float


class Alignment(NamedTuple):
    """``expert`` (H,) int64: of each neuron; and the router."""

    expert: Tensor
    router: RouterWeights


Report = Callable[[Progress], object]


class Slopes(NamedTuple):
    """The squared error, and what the entries of plan and choice change in it."""

    error: Tensor  # ()
    plan_HE: Tensor  # sum over tokens, of neuron i in expert e
    choice_TE: Tensor


def slopes(
    weights: DenseWeights,
    hidden_TH: Tensor,
    expert_H: Tensor,
    chosen_TE: Tensor,
    *,
    corrected: bool,
) -> Slopes:
    """Derivative of the squared error by the masks; corrected: the error on minus the error off."""
    num_experts = chosen_TE.shape[1]
    order = expert_H.argsort(stable=True)  # an expert's neurons side by side
    down_DH = weights.down[:, order]
    hidden_TH = hidden_TH[:, order]
    width = len(order) // num_experts
    residual_TD = (hidden_TH * (1 - chosen_TE).repeat_interleave(width, 1)) @ down_DH.T
    neurons_TH = (residual_TD @ down_DH).mul_(hidden_TH).mul_(-2)
    choice_TE = neurons_TH.view(-1, num_experts, width).sum(2)
    if corrected:
        sign_TE = 1 - 2 * chosen_TE
        hidden_ETF = hidden_TH.view(-1, num_experts, width).transpose(0, 1)
        down_EDF = down_DH.view(-1, num_experts, width).transpose(0, 1)
        grams_EFF = down_EDF.mT @ down_EDF
        choice_TE += (torch.bmm(hidden_ETF, grams_EFF) * hidden_ETF).sum(2).T * sign_TE
        curvature_TH = hidden_TH.square().mul_(weights.down_norms[order])
        neurons_TH += curvature_TH.mul_(sign_TE.repeat_interleave(width, 1))
    plan_HE = torch.empty_like(weights.down_norms[:, None].expand(-1, num_experts))
    plan_HE[order] = neurons_TH.T @ chosen_TE
    return Slopes(residual_TD.square().sum(), plan_HE, choice_TE)


def align(
    layer: DenseLayer,
    num_experts: int,
    choice: Choice,
    training: Training,
    start_H: Tensor | None = None,
    report: Report | None = None,
) -> Alignment:
    """Learn assignment and router together; the assignment starts from ``start_H`` if given."""
    generator = torch.Generator().manual_seed(training.seed)
    capacity = layer.weights.num_neurons // num_experts
    router = ScaledRouter(num_experts, layer.inputs, layer.input_scale, generator)
    noise = torch.randn(layer.weights.num_neurons, num_experts, generator=generator) * 0.01
    affinity = noise.to(layer.inputs)
    if start_H is not None:
        affinity[torch.arange(len(start_H)), start_H] += training.affinity_of_start
    affinity.requires_grad_()
    optimizer = _optimizer(
        (training.affinity_rate, [affinity]), (training.router_rate, router.parameters)
    )
    order = batches(len(layer.inputs), training.batch_size, training.steps, training.seed)
    for step, batch in enumerate(order):
        _set_rates(optimizer, step, training.steps)
        x_TD, hidden_TH = layer.inputs[batch], layer.hidden[batch]
        soft_HE = sinkhorn(affinity / temperature(step, training.steps), capacity)
        logits_TE = router(x_TD)
        with torch.no_grad():
            expert_H = greedy_rounding(soft_HE, capacity)
            chosen_TE = choice(logits_TE)
            slope = slopes(
                layer.weights, hidden_TH, expert_H, chosen_TE, corrected=training.corrected
            )
            square = layer.output_squares[batch].sum()
        optimizer.zero_grad()
        torch.autograd.backward(soft_HE, slope.plan_HE / square)
        slope_TE = slope.choice_TE / square
        torch.autograd.backward(_router_loss(logits_TE, slope_TE, chosen_TE, choice, training))
        optimizer.step()
        if report is not None:
            entropy = -torch.special.xlogy(soft_HE, soft_HE).sum(1).mean()
            report(Progress(step, float(slope.error / square), float(entropy.detach())))
    with torch.no_grad():
        soft_HE = sinkhorn(affinity / LAST_TEMPERATURE, capacity)
        weights = limited(router.weights(), layer.inputs, choice)
    return Alignment(greedy_rounding(soft_HE, capacity), weights)


def train_router(
    layer: DenseLayer,
    products_TEE: Tensor,
    choice: Choice,
    training: Training,
    report: Report | None = None,
) -> RouterWeights:
    """The router for an assignment that stays, from :meth:`DenseLayer.expert_products` of it."""
    generator = torch.Generator().manual_seed(training.seed)
    num_experts = products_TEE.shape[1]
    router = ScaledRouter(num_experts, layer.inputs, layer.input_scale, generator)
    optimizer = _optimizer((training.router_rate, router.parameters))
    order = batches(len(layer.inputs), training.batch_size, training.steps, training.seed)
    for step, batch in enumerate(order):
        _set_rates(optimizer, step, training.steps)
        logits_TE = router(layer.inputs[batch])
        with torch.no_grad():
            chosen_TE = choice(logits_TE)
            products = products_TEE[batch]
            pull_TE = (products @ (1 - chosen_TE)[:, :, None]).squeeze(2)
            error, square = ((1 - chosen_TE) * pull_TE).sum(), products.sum()
            experts_TE = -2 * pull_TE
            if training.corrected:
                experts_TE += products.diagonal(dim1=1, dim2=2) * (1 - 2 * chosen_TE)
        optimizer.zero_grad()
        slope_TE = experts_TE / square
        torch.autograd.backward(_router_loss(logits_TE, slope_TE, chosen_TE, choice, training))
        optimizer.step()
        if report is not None:
            report(Progress(step, float(error / square), 0.0))
    with torch.no_grad():
        return limited(router.weights(), layer.inputs, choice)


def _router_loss(
    logits_TE: Tensor, slope_TE: Tensor, chosen_TE: Tensor, choice: Choice, training: Training
) -> Tensor:
    if training.corrected:
        return cost_sensitive_loss(logits_TE, -slope_TE, choice)
    return straight_through_loss(logits_TE, slope_TE, chosen_TE, balance=BALANCE, z=Z)


def _optimizer(*groups: tuple[float, list[Tensor]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "peak": rate} for rate, parameters in groups],
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )


def _set_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rate_factor(step, num_steps)
