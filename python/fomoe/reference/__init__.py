# SPDX-License-Identifier: Apache-2.0
"""The ops of ``fomoe.ops`` in plain torch: the specification every kernel is tested against.

Written to be obviously right rather than fast, differentiable by plain autograd, with the same
signatures. Products of bf16 values are summed in float32 and rounded once per output.
"""

from fomoe.reference.combine import combine
from fomoe.reference.destinations import destinations
from fomoe.reference.expert_mlp import expert_mlp
from fomoe.reference.grouped_gemm import grouped_gemm
from fomoe.reference.permute import permute
from fomoe.reference.route import route
from fomoe.reference.topk_gate import topk_gate

__all__ = [
    "combine",
    "destinations",
    "expert_mlp",
    "grouped_gemm",
    "permute",
    "route",
    "topk_gate",
]
