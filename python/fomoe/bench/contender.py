# SPDX-License-Identifier: Apache-2.0
"""What is compared."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True, frozen=True)
class Contender:
    forward: Callable[[Tensor], Tensor]  # (T, D) -> (T, D)
    parameters: tuple[Tensor, ...]  # router (E, D), w1 (E, 2F, D), w2 (E, D, F)
    w1_rows: Tensor | None = None  # (2F,): where each row of its w1 is in ours; None: in place
