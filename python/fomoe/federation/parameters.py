# SPDX-License-Identifier: Apache-2.0
"""How the federation sees a model: named tensors, each shared or belonging to one expert.

Nothing about the model is known here but the rule of :mod:`fomoe.nn.naming`, so any ``nn.Module``
that follows it can be trained.
"""

from torch import nn

from fomoe.nn import ModelTensor, model_tensors

__all__ = ["federated_tensors"]


def federated_tensors(model: nn.Module) -> list[ModelTensor]:
    """Every tensor of the model: shared ones in registration order, then those of experts.

    The latter come by layer, then by expert id, then by parameter, so that two sites list the
    tensors they have in common in the same order.
    """
    tensors = list(model_tensors(model))
    of_experts = [tensor for tensor in tensors if tensor.expert is not None]
    of_experts.sort(key=lambda tensor: (tensor.layer, tensor.expert))  # stable
    return [tensor for tensor in tensors if tensor.expert is None] + of_experts
