# SPDX-License-Identifier: Apache-2.0
"""What a router did, computed on the host from the number of slots each expert was chosen for."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class RouterStatistics:
    """Routing of one layer since the last reset.

    Shares are of the slots that chose an expert, and like entropy and variation nan before the
    first choice. A slot that found none, as a partitioned router with fewer residents than top_k
    leaves them, counts nowhere. Entropy, variation and dead experts are over the candidates, the
    experts that could be chosen: the residents for a partitioned router, else all. The definitions
    are our choice: the FoMoE paper asserts high entropy without giving one.
    """

    num_choices: int  # slots that chose an expert
    num_candidates: int  # experts that could be chosen
    num_residents: int  # experts whose weights are here

    load: tuple[float, ...]  # (E,) share of the slots that chose each expert, sums to 1
    load_entropy: float  # entropy of the load / log E: 1 is uniform, 0 is a single expert
    load_variation: float  # standard deviation of the load / its mean: 0 is uniform
    dead_experts: int  # candidates that no slot chose; before the first choice, all of them
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
    num_candidates = len(candidates)
    dead_experts = sum(counts[expert] == 0 for expert in candidates)
    if total == 0:
        nan = math.nan
        return RouterStatistics(
            num_choices=0,
            num_candidates=num_candidates,
            num_residents=len(resident),
            load=(nan,) * len(counts),
            load_entropy=nan,
            load_variation=nan,
            dead_experts=dead_experts,
            ghost_share=nan,
            drop_share=nan,
        )
    load = tuple(count / total for count in counts)
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    variance = (
        sum((load[expert] - 1 / num_candidates) ** 2 for expert in candidates) / num_candidates
    )
    num_resident = sum(counts[expert] for expert in resident)
    return RouterStatistics(
        num_choices=total,
        num_candidates=num_candidates,
        num_residents=len(resident),
        load=load,
        load_entropy=entropy / math.log(num_candidates) if num_candidates > 1 else 1.0,
        load_variation=math.sqrt(variance) * num_candidates,
        dead_experts=dead_experts,
        ghost_share=(total - num_resident) / total,
        drop_share=(num_resident - num_rows) / total,
    )
