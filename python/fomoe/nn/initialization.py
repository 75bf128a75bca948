# SPDX-License-Identifier: Apache-2.0
"""Initial weights from a seed and the tensor's name, so that no site has to see foreign experts."""

import hashlib
import math

import torch
from torch import Tensor, nn

from fomoe.nn.naming import ModelTensor, model_tensors
from fomoe.nn.routed_layer import RoutedLayer

BIAS_NAMES = ("bias", "b1", "b2")


def initialize(model: nn.Module, seed: int) -> None:
    """Set every parameter of ``model`` in place, each from ``seed`` and its own name alone.

    Biases (tensors called ``bias``, ``b1`` or ``b2``) become zeros, other vectors ones, all else
    normal with standard deviation 1/sqrt(last dim), experts and router rows one by one. Two sites
    that hold the same expert get the same bits, whatever else they hold. Values are drawn in
    float32 on the CPU and then converted to the parameter's dtype and device. The scheme is our
    choice.

    After ``model.to_empty(device=...)`` this is all a model needs: it fills the buffers of
    :class:`MoE`, too.

    Raises
    ------
    ValueError
        If a parameter is on the meta device.
    """
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.reset_buffers()
    for tensor in model_tensors(model):
        if tensor.parameter.is_meta:
            raise ValueError(
                f"initialize: {tensor.name} is on the meta device; call to_empty() first"
            )
        tensor.value.copy_(_initial_value(tensor, seed))


def _initial_value(tensor: ModelTensor, seed: int) -> Tensor:
    shape = tensor.value.shape
    if tensor.name.rpartition(".")[2] in BIAS_NAMES:
        return torch.zeros(shape)
    if tensor.parameter.dim() == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * (1 / math.sqrt(shape[-1]))
