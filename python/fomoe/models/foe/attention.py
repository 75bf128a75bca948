# SPDX-License-Identifier: Apache-2.0
"""Attention of groups that each have a residual stream and a key/value head of their own.

G groups held here, B batch, S sequence, D model width, R query heads per group, N head width.
"""

import math

import torch
from torch import Tensor, nn

from fomoe.models.attention import Rotation, attend
from fomoe.models.cache import LayerView

__all__ = ["GroupAttention"]


class GroupAttention(nn.Module):
    """Row i of each parameter is of group ``group_ids[i]``.

    Parameters: ``query`` (G, R*N, D), ``key`` and ``value`` (G, N, D), ``output`` (G, D, R*N).

    Parameters
    ----------
    dim, num_heads, head_dim : int
        D, R and N.
    groups : range
        The groups that are held here.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, groups: range) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.group_ids = tuple(groups)
        num_groups, width = len(self.group_ids), num_heads * head_dim
        self.query = nn.Parameter(torch.empty(num_groups, width, dim))
        self.key = nn.Parameter(torch.empty(num_groups, head_dim, dim))
        self.value = nn.Parameter(torch.empty(num_groups, head_dim, dim))
        self.output = nn.Parameter(torch.empty(num_groups, dim, width))
        for weight in (self.query, self.key, self.value, self.output):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))

    def forward(
        self, x_GBSD: Tensor, positions: Rotation, cache: LayerView | None = None
    ) -> Tensor:
        """What each group attends to on its own stream, (G, B, S, D).

        x is (G, B, S, D), or (1, B, S, D) if all groups have the same stream. The cache has a
        key/value head for each group held here.
        """
        q_BHSN, k_BGSN, v_BGSN = (
            self._heads(x_GBSD, weight) for weight in (self.query, self.key, self.value)
        )
        y_BHSN = attend(q_BHSN, k_BGSN, v_BGSN, positions, cache)
        batch, _, length, width = y_BHSN.shape
        num_heads = self.query.shape[1] // width
        y_BGRSN = y_BHSN.view(batch, len(self.group_ids), num_heads, length, width)
        y_GTM = y_BGRSN.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
        added_GTD = y_GTM @ self.output.mT
        num_groups, _, dim = added_GTD.shape
        return added_GTD.view(num_groups, batch, length, dim)

    def _heads(self, x_GBSD: Tensor, weight_GMD: Tensor) -> Tensor:
        """All groups' heads as (B, G*M/N, S, N), for a projection to M = heads * N."""
        y_GTM = x_GBSD.flatten(1, 2) @ weight_GMD.mT
        num_groups, _, width = y_GTM.shape
        num_heads = width // self.head_dim
        y_GBSRN = y_GTM.view(num_groups, *x_GBSD.shape[1:3], num_heads, self.head_dim)
        return y_GBSRN.permute(1, 0, 3, 2, 4).flatten(1, 2)
