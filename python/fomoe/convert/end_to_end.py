# SPDX-License-Identifier: Apache-2.0
"""Stages after the layers were aligned one by one: distillation from the dense model as a whole.

:func:`distill` trains assignments and routers of all layers together, weights frozen, as DOT-MoE
(arXiv 2606.01666) does; :func:`fine_tune` then trains the weights of the finished sparse model.
Both minimise 2 KL(dense || converted) + cross entropy, with the weights of the paper's published
reproduction.

B sequences, S tokens, V vocabulary, T = B * S, D model width, H neurons, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.convert.methods import LayerResult, Method
from fomoe.convert.rounding import greedy_rounding
from fomoe.convert.router import (
    Choice,
    RouterWeights,
    cost_sensitive_loss,
    straight_through_loss,
)
from fomoe.convert.schedule import (
    BETAS,
    LAST_TEMPERATURE,
    WEIGHT_DECAY,
    batches,
    learning_rate_factor,
)
from fomoe.convert.settings import Conversion
from fomoe.convert.sinkhorn import sinkhorn
from fomoe.errors import UserError
from fomoe.models import Decoder, FeedForward

KL_WEIGHT = 2.0
AFFINITY_RATE = 0.01
ROUTER_RATE = 1e-3
FINE_TUNE_RATE = 3e-4
BALANCE = 1e-2  # of the paper's losses, for the straight-through router
Z = 1e-3
_START = 1.0  # affinity of a neuron to the expert that the local stage gave it


class EndToEndProgress(NamedTuple):
    """One step: its loss and the KL divergence in it, nats per token."""

    step: int
    loss: float
    kl: float


Report = Callable[[EndToEndProgress], object]


class Masking(NamedTuple):
    """What the backward of a mask needs to know of the layer."""

    hidden_TH: Tensor
    down_DH: Tensor
    expert_H: Tensor
    chosen_TE: Tensor
    choice: Choice
    corrected: bool


class _StraightThroughMask(torch.autograd.Function):
    """1 where a neuron's expert is chosen, (T, H); gradients go to the soft plan and the logits.

    Corrected, the loss is taken as quadratic in the layer's output with one curvature c for the
    batch. Then the derivative by the mask, summed over what is off, is -2 c |error|^2, which gives
    c; and the gradient becomes the difference between on and off, as in ``local_alignment``.
    """

    @staticmethod
    def forward(ctx: Any, soft_HE: Tensor, logits_TE: Tensor, masking: Masking) -> Tensor:
        ctx.masking = masking
        ctx.save_for_backward(logits_TE)
        return masking.chosen_TE[:, masking.expert_H].to(masking.hidden_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        masking: Masking = ctx.masking
        (logits_TE,) = ctx.saved_tensors
        slope_TH = gradients[0].float()
        plan_HE, choice_TE = _slopes(masking, slope_TH)
        with torch.enable_grad():
            logits_TE = logits_TE.detach().requires_grad_()
            if masking.corrected:
                loss = cost_sensitive_loss(logits_TE, -choice_TE, masking.choice)
            else:
                loss = straight_through_loss(
                    logits_TE, choice_TE, masking.chosen_TE, balance=BALANCE, z=Z
                )
            (router,) = torch.autograd.grad(loss, logits_TE)
        return plan_HE, router, None


def _slopes(masking: Masking, slope_TH: Tensor) -> tuple[Tensor, Tensor]:
    """What plan (H, E) and choice (T, E) change in the loss, from its derivative by the mask."""
    chosen_TE, expert_H = masking.chosen_TE, masking.expert_H
    num_experts = chosen_TE.shape[1]
    order = expert_H.argsort(stable=True)
    by_expert = (-1, num_experts, len(order) // num_experts)
    choice_TE = slope_TH[:, order].view(by_expert).sum(2)
    if masking.corrected:
        hidden_TH, down_DH = masking.hidden_TH.float(), masking.down_DH.float()
        active_TH = chosen_TE[:, expert_H]
        error = ((hidden_TH * (1 - active_TH)) @ down_DH.T).square().sum()
        pull = -(slope_TH * (1 - active_TH)).sum()
        curvature = (pull / (2 * error).clamp(min=torch.finfo(error.dtype).tiny)).clamp(min=0)
        hidden_ETF = hidden_TH[:, order].view(by_expert).transpose(0, 1)
        down_EDF = down_DH[:, order].view(by_expert).transpose(0, 1)
        squares_TE = (torch.bmm(hidden_ETF, down_EDF.mT @ down_EDF) * hidden_ETF).sum(2).T
        choice_TE = choice_TE + curvature * squares_TE * (1 - 2 * chosen_TE)
        squares_TH = hidden_TH.square() * down_DH.square().sum(0)
        slope_TH = slope_TH + curvature * squares_TH * (1 - 2 * active_TH)
    return slope_TH.T @ chosen_TE, choice_TE


class MaskedFeedForward(nn.Module):
    """A dense feed-forward with all its FLOPs, of which each token sees the chosen experts only."""

    def __init__(
        self, dense: FeedForward, result: LayerResult, choice: Choice, method: Method
    ) -> None:
        super().__init__()
        assert result.router is not None
        self.dense = dense
        self.choice = choice
        self.method = method
        num_experts = len(result.router.bias)
        self.capacity = len(result.expert) // num_experts
        self.register_buffer("fixed", result.expert, persistent=False)
        start_HE = F.one_hot(result.expert, num_experts).float() * _START * LAST_TEMPERATURE
        self.affinity = nn.Parameter(start_HE, requires_grad=method.learned)
        self.weight = nn.Parameter(result.router.weight.clone())
        self.bias = nn.Parameter(result.router.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        gate_TH, up_TH = F.linear(x_TD, self.dense.w1).chunk(2, dim=-1)
        hidden_TH = F.silu(gate_TH) * up_TH
        logits_TE = F.linear(x_TD.detach().float(), self.weight, self.bias)
        soft_HE = sinkhorn(self.affinity / LAST_TEMPERATURE, self.capacity)
        with torch.no_grad():
            expert_H, chosen_TE = self.expert(), self.choice(logits_TE)
        masking = Masking(
            hidden_TH.detach(),
            self.dense.w2.detach(),
            expert_H,
            chosen_TE,
            self.choice,
            self.method.corrected,
        )
        mask_TH: Tensor = _StraightThroughMask.apply(  # type: ignore[no-untyped-call]
            soft_HE, logits_TE, masking
        )
        return F.linear(hidden_TH * mask_TH, self.dense.w2).view_as(x)

    @torch.no_grad()
    def expert(self) -> Tensor:
        """The expert of each neuron, (H,)."""
        if not self.method.learned:
            return self.get_buffer("fixed")
        return greedy_rounding(
            sinkhorn(self.affinity / LAST_TEMPERATURE, self.capacity), self.capacity
        )

    def result(self) -> LayerResult:
        router = RouterWeights(self.weight.detach().clone(), self.bias.detach().clone())
        return LayerResult(self.expert(), router)


def distill(
    dense: Decoder,
    results: Mapping[int, LayerResult],
    top_k: int,
    method: Method,
    tokens_NS: Tensor,
    conversion: Conversion,
    report: Report,
) -> dict[int, LayerResult]:
    """Train the assignments (where the method learns them) and routers of ``results`` on."""
    choice = Choice(top_k, method.always_on, conversion.max_load)
    student = _masked(dense, results, choice, method)
    masked = {
        index: student.layers[index].get_submodule("feed_forward") for index in sorted(results)
    }
    layers = [layer for layer in masked.values() if isinstance(layer, MaskedFeedForward)]
    groups: list[dict[str, Any]] = [
        {"params": [p for layer in layers for p in (layer.weight, layer.bias)], "lr": ROUTER_RATE}
    ]
    if method.learned:
        groups.append({"params": [layer.affinity for layer in layers], "lr": AFFINITY_RATE})
    _train(student, dense, groups, tokens_NS, conversion, conversion.distill_steps, report)
    return {index: layer.result() for index, layer in zip(masked, layers, strict=True)}


def fine_tune(
    model: Decoder, dense: Decoder, tokens_NS: Tensor, conversion: Conversion, report: Report
) -> Decoder:
    """A copy of ``model`` with all weights but the routers' trained: unit gates give them none.

    They are trained in float32 at least: updates are lost in 16 bits.
    """
    dtype = model.embedding.weight.dtype
    model = deepcopy(model).to(torch.promote_types(dtype, torch.float32))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".router." not in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "lr": FINE_TUNE_RATE}]
    _train(model, dense, groups, tokens_NS, conversion, conversion.fine_tune_steps, report)
    return model.requires_grad_().to(dtype).eval()


def _masked(
    dense: Decoder, results: Mapping[int, LayerResult], choice: Choice, method: Method
) -> Decoder:
    """The dense model with masks over some layers; all its own weights frozen and shared."""
    memo = {id(parameter): parameter.detach() for parameter in dense.parameters()}
    student = deepcopy(dense, memo={key: nn.Parameter(p, False) for key, p in memo.items()})
    for index, result in results.items():
        layer = student.layers[index]
        feed_forward = layer.get_submodule("feed_forward")
        assert isinstance(feed_forward, FeedForward)
        device = feed_forward.w1.device
        router = (
            None if result.router is None else RouterWeights(*(r.to(device) for r in result.router))
        )
        moved = LayerResult(result.expert.to(device), router)
        layer.feed_forward = MaskedFeedForward(feed_forward, moved, choice, method)
    return student


def _train(
    student: Decoder,
    dense: Decoder,
    groups: list[dict[str, Any]],
    tokens_NS: Tensor,
    conversion: Conversion,
    num_steps: int,
    report: Report,
) -> None:
    optimizer = torch.optim.AdamW(
        [{**group, "peak": group["lr"]} for group in groups],
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
    )
    device = dense.embedding.weight.device
    for step, batch_BS in enumerate(_sequence_batches(tokens_NS, conversion, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, num_steps)
        batch_BS = batch_BS.to(device)
        kl, cross_entropy = _divergence(student, dense, batch_BS)
        loss = KL_WEIGHT * kl + cross_entropy
        if not bool(loss.isfinite()):
            raise UserError(
                f"step {step} after alignment has a loss of {float(loss.detach()):g}; stopped"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        report(EndToEndProgress(step, float(loss.detach()), float(kl.detach())))


def _divergence(student: Decoder, dense: Decoder, batch_BS: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || student) and the student's cross entropy, means over the predictions."""
    with torch.no_grad():
        teacher = dense(batch_BS[:, :-1]).float().flatten(0, 1).log_softmax(1)
    own = student(batch_BS[:, :-1]).float().flatten(0, 1).log_softmax(1)
    kl = F.kl_div(own, teacher, log_target=True, reduction="batchmean")
    return kl, F.nll_loss(own, batch_BS[:, 1:].flatten())


def _sequence_batches(
    tokens_NS: Tensor, conversion: Conversion, num_steps: int
) -> Iterator[Tensor]:
    size = max(1, conversion.batch_size // tokens_NS.shape[1])
    for index in batches(len(tokens_NS), size, num_steps, conversion.seed):
        yield tokens_NS[index]
