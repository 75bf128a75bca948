# SPDX-License-Identifier: Apache-2.0
"""The kernels: one module per op, each with its wrapper, fake kernel and backward."""

from fomoe.ops.combine import combine
from fomoe.ops.destinations import destinations
from fomoe.ops.expert_mlp import expert_mlp
from fomoe.ops.grouped_gemm import grouped_gemm
from fomoe.ops.permute import permute
from fomoe.ops.route import route
from fomoe.ops.topk_gate import topk_gate
from fomoe.ops.types import GateOutput, Routing

__all__ = [
    "GateOutput",
    "Routing",
    "combine",
    "destinations",
    "expert_mlp",
    "grouped_gemm",
    "permute",
    "route",
    "topk_gate",
]
