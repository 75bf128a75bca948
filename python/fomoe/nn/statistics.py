# SPDX-License-Identifier: Apache-2.0
"""What a router did, computed on the host from the number of slots each expert was chosen for."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class RouterStatistics:
    """Routing of one layer since the last reset; every number is nan before the first choice.

    Shares are of the slots that chose an expert. A slot that found none, as a partitioned router
    with fewer residents than top_k leaves them, counts nowhere. Entropy and variation are over the
    experts that could be chosen: the residents for a partitioned router, else all. The definitions
    are our choice: the FoMoE paper asserts high entropy without giving one.
    """

    load: tuple[float, ...]  # (E,) share of the slots that chose each expert, sums to 1
    load_entropy: float  # entropy of the load / log E: 1 is uniform, 0 is a single expert
    load_variation: float  # standard deviation of the load / its mean: 0 is uniform
    ghost_share: float  # share of the slots that chose an expert that is not resident
    drop_share: float  # share of the slots whose resident expert had no capacity left


def router_statistics(
    counts: Sequence[int],
    *,
    candidates: Collection[int],
    resident: Collection[int],
    num_rows: int,
) -> RouterStatistics:
    """Summarise ``counts``, (E,), the slots that chose each expert.

    ``candidates`` are the experts that could be chosen; ``num_rows`` is how many slots the
    ``resident`` ones executed.
    """
    total = sum(counts)
    if total == 0:
        nan = math.nan
        return RouterStatistics(
            load=(nan,) * len(counts),
            load_entropy=nan,
            load_variation=nan,
            ghost_share=nan,
            drop_share=nan,
        )
    load = tuple(count / total for count in counts)
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    num_candidates = len(candidates)
    variance = (
        sum((load[expert] - 1 / num_candidates) ** 2 for expert in candidates) / num_candidates
    )
    num_resident = sum(counts[expert] for expert in resident)
    return RouterStatistics(
        load=load,
        load_entropy=entropy / math.log(num_candidates) if num_candidates > 1 else 1.0,
        load_variation=math.sqrt(variance) * num_candidates,
        ghost_share=(total - num_resident) / total,
        drop_share=(num_resident - num_rows) / total,
    )
