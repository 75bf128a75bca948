# SPDX-License-Identifier: Apache-2.0
"""Balancing the experts' load by a bias on their selection, without a loss.

The method of Wang et al. (arXiv 2408.15664, algorithm 1), as used by DeepSeek-V3 (arXiv 2412.19437,
section 2.1.2). E experts.

With sigmoid scores the bias is added to the score, as in both papers; with softmax and unit scores
to the logit instead of the probability, so that choosing experts needs no sum (our choice).
"""

from collections.abc import Callable, Collection
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn


class LoadBalancer(nn.Module):
    """A bias that a router adds to the scores it ranks, never to the weights of what it chose.

    ``bias`` is part of the state and stays in float32 whatever dtype the layer is converted to:
    bfloat16 would round a bias of 1 and a step of 1e-3 to 1. ``counts`` are the slots that chose
    each expert in training since the last update.
    """

    bias: Tensor  # (E,) float32
    counts: Tensor  # (E,) int64
    is_balanced: Tensor  # (E,) bool: experts that can be chosen here; others keep their bias

    def __init__(self, num_experts: int, balanced_experts: Collection[int], rate: float) -> None:
        super().__init__()
        self.balanced_experts, self.rate = balanced_experts, rate
        self.register_buffer("bias", torch.empty(num_experts, dtype=torch.float32))
        for name, dtype in (("counts", torch.int64), ("is_balanced", torch.bool)):
            self.register_buffer(name, torch.empty(num_experts, dtype=dtype), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the buffers: no bias, nothing counted."""
        self.bias.zero_()
        self.counts.zero_()
        experts = range(len(self.is_balanced))
        self.is_balanced.copy_(torch.tensor([e in self.balanced_experts for e in experts]))

    def update(self, counts: Tensor) -> None:
        """bias += rate * sign(mean load - load) for ``counts`` (E,) int64; clears the own counts.

        In integers up to the sign, so that a load equal to the mean is seen as such.
        """
        direction = torch.sign(counts.sum() - len(self.balanced_experts) * counts)
        self.bias += self.rate * (direction * self.is_balanced)
        self.counts.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != torch.float32:
            self.bias = exact.to(self.bias.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.bias = self.bias.float()  # assign=True takes the dtype of the checkpoint


@torch.no_grad()
def update_biases(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Step the selection bias of every layer of ``model`` that has one; clears their counts.

    bias += rate * sign(mean load - load), where the load of an expert is the slots that chose it
    (kept, dropped or ghost) in the training forwards since the last call. Call it after each
    optimizer step. Does not wait for the device; without tokens it changes nothing.

    Parameters
    ----------
    model : nn.Module
    process_group : ProcessGroup, optional
        Ranks that train the same model on different tokens: their loads are added up first, in one
        all-reduce for all layers, so that they make the same step. With a partitioned router they
        must hold the same experts. With DistributedDataParallel set ``broadcast_buffers=False``,
        or it replaces the counts of every rank by those of the first.
    """
    balancers = [module for module in model.modules() if isinstance(module, LoadBalancer)]
    if not balancers:
        return
    own_counts = [balancer.counts for balancer in balancers]
    counts = torch.cat(own_counts)
    if process_group is not None:
        dist.all_reduce(counts, group=process_group)
    split = torch.split_with_sizes(counts, [len(own) for own in own_counts])
    for balancer, own in zip(balancers, split, strict=True):
        balancer.update(own)
