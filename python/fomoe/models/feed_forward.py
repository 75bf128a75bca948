# SPDX-License-Identifier: Apache-2.0
"""The feed-forward block of a dense layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """y = w2 @ (silu(gate) * up), where gate and up are the halves of w1 @ x (arXiv 2002.05202).

    Parameters: ``w1`` (2F, D), the F gate rows before the F up rows, and ``w2`` (D, F): the layout
    of a swiglu expert, so that any neurons of it can become one.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(2 * width, dim))
        self.w2 = nn.Parameter(torch.empty(dim, width))
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to every vector of x (..., D), of any float dtype."""
        gate, up = F.linear(x, self.w1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w2)
