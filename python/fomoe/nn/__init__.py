# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer, its initialisation and what it reports about its router."""

from fomoe.nn.initialization import initialize
from fomoe.nn.moe import Experts, MoE, MoEConfig, auxiliary_loss
from fomoe.nn.naming import expert_tensor_name, named_tensors
from fomoe.nn.statistics import RouterStatistics

__all__ = [
    "Experts",
    "MoE",
    "MoEConfig",
    "RouterStatistics",
    "auxiliary_loss",
    "expert_tensor_name",
    "initialize",
    "named_tensors",
]
