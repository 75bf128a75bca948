# SPDX-License-Identifier: Apache-2.0
"""Clusters of equal size.

H points (neurons), E clusters (experts).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.convert.rounding import greedy_rounding

PASSES = 10


def balanced_k_means(
    points_HP: Tensor, num_clusters: int, generator: torch.Generator, passes: int = PASSES
) -> Tensor:
    """Spherical k-means in which every cluster has H / E points.

    Points are scaled to length 1. The first centres are points drawn by ``generator`` (on the CPU);
    each pass assigns by greedy rounding of the cosines, then takes the mean. Our choice.

    Parameters
    ----------
    points_HP : Tensor, (H, P), float32 | float64

    Returns
    -------
    Tensor, (H,), int64
        The cluster of each point.

    Raises
    ------
    ValueError
        If E does not divide H.
    """
    points_HP = F.normalize(points_HP, dim=1)
    num_points = len(points_HP)
    first = torch.randperm(num_points, generator=generator)[:num_clusters]
    centres_EP = points_HP[first.to(points_HP.device)]
    cluster_H = torch.empty(0)
    for _ in range(passes):
        cluster_H = greedy_rounding(points_HP @ centres_EP.T, num_points // num_clusters)
        sums_EP = torch.zeros_like(centres_EP).index_add_(0, cluster_H, points_HP)
        centres_EP = F.normalize(sums_EP, dim=1)
    return cluster_H
