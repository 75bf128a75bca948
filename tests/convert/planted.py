# SPDX-License-Identifier: Apache-2.0
"""A layer whose experts exist."""

import torch
import torch.nn.functional as F

from fomoe.convert.dense import DenseLayer, DenseWeights


def planted_layer(num_tokens=512, num_experts=4, size=6, dim=12):
    """Layer, and group of each neuron: group e is strong on tokens with a mark in dim e."""
    generator = torch.Generator().manual_seed(0)
    num_neurons = num_experts * size
    group = torch.randperm(num_neurons, generator=generator) % num_experts
    gate = 0.1 * torch.randn(num_neurons, dim, generator=generator)
    gate[torch.arange(num_neurons), group] += 4
    gate[:, :num_experts][F.one_hot(group, num_experts) == 0] = -4
    up = torch.randn(num_neurons, dim, generator=generator)
    down = torch.randn(dim, num_neurons, generator=generator)
    x = torch.randn(num_tokens, dim, generator=generator)
    x[:, :num_experts] = F.one_hot(torch.arange(num_tokens) % num_experts, num_experts).float()
    return DenseLayer(DenseWeights(gate, up, down), x), group
