# SPDX-License-Identifier: Apache-2.0
"""The kernels: one module per op, each with its wrapper, fake kernel and backward."""

from fomoe.ops.permute import permute
from fomoe.ops.types import GateOutput, Routing

__all__ = ["GateOutput", "Routing", "permute"]
