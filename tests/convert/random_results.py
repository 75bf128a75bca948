# SPDX-License-Identifier: Apache-2.0
"""Conversions with assignments and routers at random."""

import torch

from fomoe.convert.assemble import assemble
from fomoe.convert.methods import LayerResult
from fomoe.convert.router import RouterWeights
from fomoe.convert.settings import Conversion, converted_config


def random_results(dense, num_experts, layers=(0, 1, 2)):
    generator = torch.Generator().manual_seed(3)
    width, dim = dense.config.dense_dim, dense.config.dim

    def draw():
        expert = torch.randperm(width, generator=generator) % num_experts
        weight = torch.randn(num_experts, dim, generator=generator)
        return LayerResult(expert, RouterWeights(weight, torch.randn(num_experts)))

    return {layer: draw() for layer in layers}


def convert(dense, results, **settings):
    conversion = Conversion(expert_size=8, **settings)
    return assemble(dense, converted_config(dense.config, conversion), results)
