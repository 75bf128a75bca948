# SPDX-License-Identifier: Apache-2.0
"""The token router and how it learns which experts a token needs.

T tokens, D model width, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PRICE_STEPS = 96


class RouterWeights(NamedTuple):
    """Of a plain linear router over the layer's input: ``weight`` (E, D) and ``bias`` (E,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Choice:
    """How many experts a token takes: the first ``always_on`` ones and the best others."""

    top_k: int
    always_on: int = 0
    max_load: float | None = None
    """How many even shares of the tokens a router may learn to give one of the others."""

    def __call__(self, logits_TE: Tensor) -> Tensor:
        """1 for a chosen expert, 0 for another, (T, E), dtype of the logits."""
        fixed = self.always_on
        chosen_TE = torch.zeros_like(logits_TE)
        chosen_TE[:, :fixed] = 1
        best = logits_TE[:, fixed:].topk(self.top_k - fixed, dim=1).indices
        return chosen_TE.scatter_(1, best + fixed, 1)


def cost_sensitive_loss(logits_TE: Tensor, benefits_TE: Tensor, choice: Choice) -> Tensor:
    """Multi-label cross entropy towards the experts whose benefit is among the best; scalar.

    The threshold of a token lies midway between the last benefit that is chosen and the next; the
    weight of a label is its distance from the threshold, over the batch's mean distance. Our
    choice, in place of the paper's straight-through softmax, whose gradient vanishes once an expert
    is always on. ``benefits_TE`` says by how much each expert lowers the loss when it is on, and
    is reduced by what keeps the labels within ``choice.max_load``. Zero where every expert is
    chosen.
    """
    logits_TE, benefits_TE = logits_TE[:, choice.always_on :], benefits_TE[:, choice.always_on :]
    num_chosen = choice.top_k - choice.always_on
    if num_chosen == logits_TE.shape[1]:
        return 0 * logits_TE.sum()
    if choice.max_load is not None:
        benefits_TE = benefits_TE - limiting_prices(benefits_TE, num_chosen, choice.max_load)
    best = benefits_TE.topk(num_chosen + 1, dim=1).values
    threshold_T1 = best[:, -2:].mean(1, keepdim=True)
    distance_TE = (benefits_TE - threshold_T1).abs()
    return F.binary_cross_entropy_with_logits(
        logits_TE,
        (benefits_TE > threshold_T1).to(logits_TE.dtype),
        weight=distance_TE / distance_TE.mean().clamp(min=torch.finfo(distance_TE.dtype).tiny),
    )


def limiting_prices(scores_TE: Tensor, top_k: int, max_load: float) -> Tensor:
    """Prices (E,), at least 0, that limit how many tokens have an expert among their best K.

    With the prices taken off the scores, no expert serves more than ``max_load`` even shares,
    T K / E tokens each, but for what the last step of the search leaves. Our choice: the prices of
    the linear program of the best assignment within these limits, by coordinate steps of half
    length. Ties of scores can exceed the limit.
    """
    num_tokens, num_experts = scores_TE.shape
    most = int(max_load * num_tokens * top_k / num_experts)
    prices_E = scores_TE.new_zeros(num_experts)
    if most >= num_tokens or top_k == num_experts:
        return prices_E
    for _ in range(_PRICE_STEPS):
        priced_TE = scores_TE - prices_E
        best = priced_TE.topk(top_k + 1, dim=1).values
        last_T1, next_T1 = best[:, -2:-1], best[:, -1:]
        # By how much an expert is in, or out if negative; of the best `most` it may be in.
        margin_TE = priced_TE - torch.where(priced_TE >= last_T1, next_T1, last_T1)
        excess_E = margin_TE.kthvalue(num_tokens - most, dim=0).values
        prices_E = (prices_E + excess_E / 2).clamp(min=0)
    return prices_E


def limited(router: RouterWeights, inputs_TD: Tensor, choice: Choice) -> RouterWeights:
    """The router with its bias lowered until ``choice.max_load`` holds on these inputs."""
    rest = slice(choice.always_on, None)
    num_chosen = choice.top_k - choice.always_on
    if choice.max_load is None or num_chosen == 0:
        return router
    logits_TE = F.linear(inputs_TD, router.weight, router.bias)[:, rest]
    bias_E = router.bias.clone()
    bias_E[rest] -= limiting_prices(logits_TE, num_chosen, choice.max_load)
    return router._replace(bias=bias_E)


def straight_through_loss(
    logits_TE: Tensor, gradient_TE: Tensor, chosen_TE: Tensor, *, balance: float, z: float
) -> Tensor:
    """A scalar whose gradient is the paper's: d loss / d choice goes to softmax(logits).

    With its z and balance losses (arXiv 2606.01666 equations 12 to 15), whose coefficients are
    ``z`` and ``balance``.
    """
    probability_TE = logits_TE.softmax(1)
    usage_E = chosen_TE.mean(0) / chosen_TE[0].sum()
    return (
        (gradient_TE * probability_TE).sum()
        + balance * len(usage_E) * (usage_E * probability_TE.mean(0)).sum()
        + z * logits_TE.logsumexp(1).square().mean()
    )


class ScaledRouter:
    """A linear router that sees inputs of root mean square 1 and a constant 1.

    An expert that every token needs wants a bias, and one learning rate should fit all layers. The
    scale is folded into the weights of :meth:`weights`.
    """

    def __init__(
        self, num_experts: int, inputs_TD: Tensor, scale: float, generator: torch.Generator
    ) -> None:
        self.scale = max(scale, torch.finfo(torch.float32).tiny)
        weight = torch.randn(num_experts, inputs_TD.shape[1], generator=generator) * 0.01
        self.weight = weight.to(inputs_TD).requires_grad_()
        self.bias = inputs_TD.new_zeros(num_experts).requires_grad_()

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """Logits, (T, E)."""
        return F.linear(inputs_TD / self.scale, self.weight, self.bias)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def weights(self) -> RouterWeights:
        return RouterWeights(self.weight.detach() / self.scale, self.bias.detach().clone())
