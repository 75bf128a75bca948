# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with rotary positions and grouped key/value heads.

B batch, S sequence, D model width, H query heads, G key/value heads, N head width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.models.cache import LayerView
from fomoe.models.language_model_config import RopeScaling
from fomoe.models.normalization import RMSNorm


class Rotation(NamedTuple):
    """Cosine and sine of every position's rotary angles, each (S, N/2), float32 or float64.

    Where sequences have positions of their own, each (B, 1, S, N/2).
    """

    cos: Tensor
    sin: Tensor

    def at(self, positions_BS: Tensor) -> "Rotation":
        """The angles of these positions, for every sequence its own."""
        return Rotation(self.cos[positions_BS][:, None], self.sin[positions_BS][:, None])


def rotation(
    length: int,
    head_dim: int,
    theta: float,
    *,
    scaling: RopeScaling | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Rotation:
    """Angles of positions 0 to length - 1: position * theta^(-2i / head_dim), i < head_dim / 2.

    Source: RoFormer (arXiv 2104.09864). ``scaling`` changes the frequencies, theta^(...).
    """
    exponent = -torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    position = torch.arange(length, dtype=dtype, device=device)
    frequency = theta**exponent
    if scaling is not None:
        frequency = _scaled(frequency, scaling)
    angle = position[:, None] * frequency
    return Rotation(angle.cos(), angle.sin())


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context / (2 * math.pi) * frequency
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * slow + kept * frequency


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (x[i], x[i + N/2]) of x (..., S, N) by their position's angles.

    Computed in the dtype of the angles, returned in the dtype of x.
    """
    x1, x2 = x.chunk(2, dim=-1)  # promoted by the products
    turned = torch.cat([x1 * by.cos - x2 * by.sin, x2 * by.cos + x1 * by.sin], dim=-1)
    return turned.to(x.dtype)


def attend(
    q_BHSN: Tensor,
    k_BGSN: Tensor,
    v_BGSN: Tensor,
    positions: Rotation,
    cache: LayerView | None = None,
    *,
    sliding_window: int = 0,
) -> Tensor:
    """Rotated queries over rotated keys, causally, (B, H, S, N); see :class:`Attention`.

    Of the H heads, the first H/G share the first key/value head, and so on.
    """
    q_BHSN, k_BGSN = rotate(q_BHSN, positions), rotate(k_BGSN, positions)
    if cache is None:
        mask = _window_mask(q_BHSN, sliding_window)
    else:
        k_BGSN, v_BGSN = cache.extend(k_BGSN, v_BGSN)
        mask = cache.mask(sliding_window)
    return F.scaled_dot_product_attention(
        q_BHSN,
        k_BGSN,
        v_BGSN,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BHSN.shape[1] != k_BGSN.shape[1],
    )


def _window_mask(q_BHSN: Tensor, sliding_window: int) -> Tensor | None:
    """Which positions (column) one (row) sees, (S, S) bool; None: all up to itself."""
    length = q_BHSN.shape[2]
    if sliding_window == 0 or length <= sliding_window:
        return None
    past = torch.ones(length, length, dtype=torch.bool, device=q_BHSN.device).tril()
    return past.triu(1 - sliding_window)


class Attention(nn.Module):
    """Parameters: ``query`` (H*N, D), ``key`` and ``value`` (G*N, D), ``output`` (D, H*N).

    Parameters
    ----------
    dim, num_heads, num_kv_heads, head_dim : int
        D, H, G and N.
    qkv_bias, output_bias : bool
        Whether ``query``, ``key`` and ``value``, or ``output``, have a ``bias``.
    head_norm_epsilon : float, optional
        Normalise every query and key head by an RMSNorm before its rotation, as in Qwen3 (arXiv
        2505.09388): ``query_norm`` and ``key_norm``, (N,) each.
    sliding_window : int
        How many positions one sees, itself the last of them; 0: all before it, too.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        head_norm_epsilon: float | None = None,
        sliding_window: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.sliding_window = sliding_window
        self.query = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.output = nn.Linear(num_heads * head_dim, dim, bias=output_bias)
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if head_norm_epsilon is not None:
            self.query_norm = RMSNorm(head_dim, head_norm_epsilon)
            self.key_norm = RMSNorm(head_dim, head_norm_epsilon)

    def forward(self, x_BSD: Tensor, positions: Rotation, cache: LayerView | None = None) -> Tensor:
        """Attend from every position to itself and the ones before it, (B, S, D).

        With a cache, which takes the new keys and values, also to the tokens of earlier calls.
        """
        projections = (self.query(x_BSD), self.key(x_BSD), self.value(x_BSD))
        q_BHSN, k_BGSN, v_BGSN = (
            p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections
        )
        y_BHSN = attend(
            self.query_norm(q_BHSN),
            self.key_norm(k_BGSN),
            v_BGSN,
            positions,
            cache,
            sliding_window=self.sliding_window,
        )
        y_BSD: Tensor = self.output(y_BHSN.transpose(1, 2).flatten(2))
        return y_BSD
