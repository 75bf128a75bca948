# SPDX-License-Identifier: Apache-2.0
"""Training an expert-parallel model by hand: which gradients are already sums over all ranks.

A rank's loss is a mean over its own tokens, and the loss of all ranks the mean of theirs. What DDP
or FSDP2 average, the shared parameters, comes out right by itself. An expert's gradient on its
owner is the sum over all ranks, which only has to be divided by their number.

A step: forward, ``backward()``, :func:`finish_expert_gradients`, :func:`clip_grad_norm`, optimizer.
Give DDP ``model_parameters_to_ignore`` or FSDP2 ``ignored_params`` from :func:`expert_parameters`.

Ranks whose numbers of tokens differ weigh their losses beforehand: times their tokens, times the
number of ranks, over the tokens of all.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fomoe.nn.routed_layer import RoutedLayer

__all__ = ["clip_grad_norm", "expert_parameters", "finish_expert_gradients"]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters of which every rank has its own: those of exchanged experts."""
    return {
        f"{prefix}.experts.{name}" if prefix else f"experts.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, RoutedLayer) and module.exchange is not None
        for name, parameter in module.experts.named_parameters()
    }


def finish_expert_gradients(model: nn.Module, num_ranks: int) -> None:
    """Divide the gradients of exchanged experts by the number of ranks, in place."""
    for parameter in expert_parameters(model).values():
        if parameter.grad is not None:
            parameter.grad /= num_ranks


def clip_grad_norm(
    model: nn.Module, max_norm: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale all gradients so that the norm over the whole model, on all ranks, is at most max_norm.

    Parameters
    ----------
    model : nn.Module
        Shared parameters have the same gradient on every rank, or are sharded by FSDP2.
    max_norm : float
    group : dist.ProcessGroup, optional
        The ranks among which the experts are, all ranks by default. All of them must call it, also
        one without an expert.

    Returns
    -------
    Tensor, (), float32 (float64 for float64 parameters)
        The norm before.
    """
    own = {id(parameter) for parameter in expert_parameters(model).values()}
    shared = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in own]
    experts = [p.grad for p in model.parameters() if p.grad is not None and id(p) in own]
    squares = [_square_norm(experts), _square_norm(shared)]
    wide = next((s for s in squares if s is not None), torch.zeros(()))
    of_experts = wide.new_zeros(()) if squares[0] is None else squares[0]
    dist.all_reduce(of_experts, group=group)
    total = of_experts if squares[1] is None else of_experts + squares[1]
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
    for gradient in [*shared, *experts]:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)
    return norm


def _square_norm(gradients: list[Tensor]) -> Tensor | None:
    """Over all elements, shards of other ranks too; None without gradients."""
    total: Tensor | None = None
    for kind in (True, False):
        group = [g for g in gradients if isinstance(g, DTensor) == kind]
        if group:
            norm = nn.utils.get_total_norm(group)
            square = (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
            total = square if total is None else total + square
    return total
