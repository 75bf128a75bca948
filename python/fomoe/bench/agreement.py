# SPDX-License-Identifier: Apache-2.0
"""Whether contenders compute the same thing, asked before any of them is timed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fomoe import reference
from fomoe.bench.contender import Contender
from fomoe.errors import UserError

NUM_TOKENS = 256
# Largest ||contender - exact|| / ||exact|| of the output and of each gradient.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# How far apart, relative to the largest logit, the last chosen and the first other logit are to be.
_CLEAR_CHOICE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


class Agreement(NamedTuple):
    """Relative errors in the Frobenius norm, against float64."""

    output: float
    gradient: float  # the worst of those of x, the router, w1 and w2
    tolerance: float


def check_agreement(
    contenders: Mapping[str, Contender], top_k: int, *, seed: int = 0
) -> dict[str, Agreement]:
    """Compare each contender's output and gradients with the reference in float64.

    Tokens whose choice of experts hangs on the rounding of the logits are left out: in bfloat16,
    contenders that round their logits (all but fomoe) choose other experts for them.

    Raises
    ------
    UserError
        When one is off by more than the tolerance of its dtype, or no token is left to compare.
    """
    weights = [p.detach() for p in next(iter(contenders.values())).parameters]
    dtype = weights[0].dtype
    generator = torch.Generator().manual_seed(seed)
    device = weights[0].device
    x = torch.randn(NUM_TOKENS, weights[0].shape[1], generator=generator).to(device, dtype)
    x = x[_has_clear_choice(x, weights[0], top_k)]
    if len(x) == 0:
        raise UserError(
            f"no token has a choice of experts that is clear in {dtype}: nothing to compare"
        )
    grad_y = torch.randn(x.shape, generator=generator).to(device, dtype)
    exact = _exact(x, grad_y, weights, top_k)
    agreements = {}
    for name, contender in contenders.items():
        for parameter in contender.parameters:
            parameter.grad = None
        leaf = x.clone().requires_grad_()
        y = contender.forward(leaf)
        torch.autograd.backward(y, grad_y)
        found = [y, leaf.grad, *(parameter.grad for parameter in contender.parameters)]
        wanted = list(exact)
        if contender.w1_rows is not None:
            wanted[3] = wanted[3][:, contender.w1_rows]
        errors = [_relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
        agreement = Agreement(errors[0], max(errors[1:]), TOLERANCES[dtype])
        if not max(errors) <= agreement.tolerance:
            raise UserError(
                f"{name} is off the float64 reference by {agreement.output:.1e} in its output and "
                f"{agreement.gradient:.1e} in its gradients, beyond {agreement.tolerance:g}: this "
                f"shape cannot be compared in {dtype}"
            )
        agreements[name] = agreement
    return agreements


def _has_clear_choice(x: Tensor, router: Tensor, top_k: int) -> Tensor:
    logits = x.double() @ router.double().mT
    if top_k == logits.shape[1]:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    ordered = logits.sort(dim=1, descending=True).values
    gap = ordered[:, top_k - 1] - ordered[:, top_k]
    return gap > _CLEAR_CHOICE[x.dtype] * logits.abs().amax(dim=1)


def _exact(x: Tensor, grad_y: Tensor, weights: Sequence[Tensor], top_k: int) -> list[Tensor]:
    """y and the gradients of x, router, w1 and w2."""
    leaves = [tensor.double().requires_grad_() for tensor in (x, *weights)]
    wide_x, router, w1, w2 = leaves
    num_experts = router.shape[0]
    gate = reference.topk_gate(wide_x @ router.mT, top_k, renormalize=True)
    expert_map = torch.arange(num_experts, dtype=torch.int32, device=x.device)
    routing = reference.route(gate.ids, expert_map, num_experts)
    y = reference.expert_mlp(wide_x, gate.weights, w1, w2, routing)
    return [y, *torch.autograd.grad(y, leaves, grad_y.double())]


def _relative_error(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return float(((found.double() - exact).norm() / exact.norm()).detach())
