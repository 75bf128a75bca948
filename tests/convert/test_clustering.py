# SPDX-License-Identifier: Apache-2.0
"""Balanced k-means."""

import torch

from fomoe.convert.clustering import balanced_k_means


def test_points_in_two_directions_become_two_clusters():
    points = torch.tensor([[1.0, 0.1], [0.1, 2], [3, 0], [0, 1]])
    cluster = balanced_k_means(points, 2, torch.Generator().manual_seed(0))
    assert cluster[0] == cluster[2] != cluster[1] == cluster[3]


def test_every_cluster_has_as_many_points():
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    cluster = balanced_k_means(points, 4, torch.Generator().manual_seed(1))
    assert cluster.bincount().tolist() == [15] * 4
