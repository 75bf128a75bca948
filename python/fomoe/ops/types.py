# SPDX-License-Identifier: Apache-2.0
"""Types shared by the ops and their reference."""

from typing import NamedTuple

from torch import Tensor


class GateOutput(NamedTuple):
    """What :func:`fomoe.ops.topk_gate` returns."""

    ids: Tensor
    weights: Tensor
    counts: Tensor
    prob_sum: Tensor
    z_sum: Tensor


class Routing(NamedTuple):
    """What :func:`fomoe.ops.route` returns."""

    slot_to_row: Tensor
    row_to_slot: Tensor
    offsets: Tensor
