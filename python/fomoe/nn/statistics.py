# SPDX-License-Identifier: Apache-2.0
"""What a router did, computed on the host from the number of slots each expert was chosen for."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class RouterStatistics:
    """Routing of one layer since the last reset; every number is nan before the first token.

    The definitions are our choice: the FoMoE paper asserts high entropy without giving one.
    """

    load: tuple[float, ...]  # (E,) share of the slots each expert was chosen for, sums to 1
    load_entropy: float  # entropy of the load / log E: 1 is uniform, 0 is a single expert
    load_variation: float  # standard deviation of the load / its mean: 0 is uniform
    ghost_share: float  # share of the slots that chose an expert that is not resident


def router_statistics(counts: Sequence[int], resident: Collection[int]) -> RouterStatistics:
    """Summarise ``counts`` (one per expert, slots that chose it) given the ``resident`` ids."""
    num_experts, total = len(counts), sum(counts)
    if total == 0:
        nan = math.nan
        return RouterStatistics(
            load=(nan,) * num_experts, load_entropy=nan, load_variation=nan, ghost_share=nan
        )
    load = tuple(count / total for count in counts)
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    variance = sum((share - 1 / num_experts) ** 2 for share in load) / num_experts
    return RouterStatistics(
        load=load,
        load_entropy=entropy / math.log(num_experts) if num_experts > 1 else 1.0,
        load_variation=math.sqrt(variance) * num_experts,
        ghost_share=(total - sum(counts[expert] for expert in resident)) / total,
    )
