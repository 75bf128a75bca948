# SPDX-License-Identifier: Apache-2.0
"""What a layer's tokens cost on the way: the paper's formulas (arXiv 2605.06206, section 4).

Volumes are in units of all tokens' hidden vectors, S * D elements, per layer and forward. N ranks,
H groups, K experts per token.

The paper sets the all-to-all's volume, which is that of all ranks together, against the
all-reduce's, which is that of one rank; so counted, the ratio with N <= H is K. Counted alike, for
one rank or for all, it is K / N: see ``docs/foe.md``.
"""

__all__ = ["all_reduce_of_foe", "all_to_all_of_foe", "all_to_all_of_moe"]


def all_to_all_of_moe(top_k: int, num_ranks: int) -> float:
    """2 K (N-1)/N: sent by all ranks, there and back, one row for every expert on another rank."""
    return 2 * top_k * (num_ranks - 1) / num_ranks


def all_to_all_of_foe(top_k: int, num_ranks: int, num_groups: int) -> float:
    """2 K max(N-H, 0)/N: sent by all ranks, inside of the groups."""
    return 2 * top_k * max(num_ranks - num_groups, 0) / num_ranks


def all_reduce_of_foe(num_ranks: int, num_groups: int) -> float:
    """2 (n-1)/n with n = min(N, H): sent by one rank, of the tokens that it has, in a ring."""
    num_holders = min(num_ranks, num_groups)
    return 2 * (num_holders - 1) / num_holders
