# SPDX-License-Identifier: Apache-2.0
"""RMSNorm."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight over the last dim, computed in float32.

    ``weight`` is (D,). The result has the dtype of x; float64 is computed in float64.
    """

    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D) of any float dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return (normal * self.weight).to(x.dtype)
