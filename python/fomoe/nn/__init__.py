# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer, its initialisation and what it reports about its router."""

from fomoe.nn.balancing import LoadBalancer, update_biases
from fomoe.nn.config import MoEConfig
from fomoe.nn.experts import Experts, SharedExpert
from fomoe.nn.initialization import initialize
from fomoe.nn.moe import MoE
from fomoe.nn.naming import ModelTensor, expert_tensor_name, model_tensors, named_tensors
from fomoe.nn.routed_layer import RoutedLayer, auxiliary_loss
from fomoe.nn.statistics import RouterStatistics

__all__ = [
    "Experts",
    "LoadBalancer",
    "MoE",
    "MoEConfig",
    "ModelTensor",
    "RoutedLayer",
    "RouterStatistics",
    "SharedExpert",
    "auxiliary_loss",
    "expert_tensor_name",
    "initialize",
    "model_tensors",
    "named_tensors",
    "update_biases",
]
