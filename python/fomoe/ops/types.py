# SPDX-License-Identifier: Apache-2.0
"""What the ops hand to each other.

T tokens, E experts, E_local resident experts, K experts per token, R = T * K routed rows.
Slot t * K + k is the k-th choice of token t. The accumulation dtype is float64 for float64 inputs
and float32 for all others.
"""

from typing import NamedTuple

from torch import Tensor


class GateOutput(NamedTuple):
    """The router's decision for a batch of tokens, see ``topk_gate``."""

    ids: Tensor  # (T, K) int32: chosen experts, best first; -1 where there are fewer than K
    weights: Tensor  # (T, K) accumulation dtype, differentiable; 0 where the id is -1
    counts: Tensor  # (E,) int64: how many slots chose the expert
    prob_sum: Tensor  # (E,) accumulation dtype, differentiable: probability summed over tokens
    z_sum: Tensor  # () accumulation dtype, differentiable: squared logsumexp summed over tokens


class Routing(NamedTuple):
    """Where each slot's row lies when rows are ordered by resident expert, see ``route``."""

    slot_to_row: Tensor  # (T, K) int32: row of the slot, -1 for a ghost or drop
    row_to_slot: Tensor  # (R,) int32: slot of the row, -1 from offsets[-1] on
    offsets: Tensor  # (E_local + 1,) int32: expert e owns rows offsets[e] up to offsets[e + 1]
