# SPDX-License-Identifier: Apache-2.0
"""Initial weights from a seed and the tensor's name, so that no site has to see foreign experts."""

import hashlib
import math

import torch
from torch import Tensor, nn

from fomoe.nn.moe import MoE
from fomoe.nn.naming import named_tensors

BIAS_NAMES = ("bias", "b1", "b2")


def initialize(model: nn.Module, seed: int) -> None:
    """Set every parameter of ``model`` in place, each from ``seed`` and its own name alone.

    Biases (tensors called ``bias``, ``b1`` or ``b2``) become zeros, other vectors ones, all else
    normal with standard deviation 1/sqrt(last dim). Two sites that hold the same expert get the
    same bits, whatever else they hold. Values are drawn in float32 on the CPU and then converted to
    the parameter's dtype and device. The scheme is our choice.

    After ``model.to_empty(device=...)`` this is all a model needs: it fills the buffers of
    :class:`MoE`, too.

    Raises
    ------
    ValueError
        If a parameter is on the meta device.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            module.reset_buffers()
    for name, tensor in named_tensors(model):
        if tensor.is_meta:
            raise ValueError(f"initialize: {name} is on the meta device; call to_empty() first")
        tensor.copy_(_initial_value(tensor.shape, seed, name))


def _initial_value(shape: torch.Size, seed: int, name: str) -> Tensor:
    if name.rpartition(".")[2] in BIAS_NAMES:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * (1 / math.sqrt(shape[-1]))
