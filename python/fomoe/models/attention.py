# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with rotary positions and grouped key/value heads.

B batch, S sequence, D model width, H query heads, G key/value heads, N head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rotation(NamedTuple):
    """Cosine and sine of every position's rotary angles, each (S, N/2), float32 or float64."""

    cos: Tensor
    sin: Tensor


def rotation(
    length: int, head_dim: int, theta: float, *, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """Angles of positions 0 to length - 1: position * theta^(-2i / head_dim), i < head_dim / 2.

    Source: RoFormer (arXiv 2104.09864).
    """
    exponent = -torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    position = torch.arange(length, dtype=dtype, device=device)
    angle = position[:, None] * theta**exponent
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (x[i], x[i + N/2]) of x (..., S, N) by their position's angles.

    Computed in the dtype of the angles, returned in the dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)  # promoted by the products
    turned = torch.cat([x1 * by.cos - x2 * by.sin, x2 * by.cos + x1 * by.sin], dim=-1)
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Parameters: ``query`` (H*N, D), ``key`` and ``value`` (G*N, D), ``output`` (D, H*N)."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grouped = num_kv_heads != num_heads
        self.query = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.key = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, positions: Rotation) -> Tensor:
        """Attend from every position to itself and the ones before it, (B, S, D)."""
        projections = (self.query(x_BSD), self.key(x_BSD), self.value(x_BSD))
        q_BHSN, k_BGSN, v_BGSN = (
            p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections
        )
        y_BHSN = F.scaled_dot_product_attention(
            rotate(q_BHSN, positions),
            rotate(k_BGSN, positions),
            v_BGSN,
            is_causal=True,
            enable_gqa=self.grouped,
        )
        y_BSD: Tensor = self.output(y_BHSN.transpose(1, 2).flatten(2))
        return y_BSD
