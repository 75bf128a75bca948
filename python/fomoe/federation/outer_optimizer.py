# SPDX-License-Identifier: Apache-2.0
"""What happens to the mean of the sites' contributions (FoMoE Algorithm 1, OuterOpt).

The owner of a piece takes the step once and sends the result, so that all holders agree on any
hardware.
"""

import torch
from torch import Tensor

from fomoe.federation.exchange import Carried, Chunk

__all__ = ["Nesterov"]


class Nesterov:
    """DiLoCo's outer SGD with Nesterov momentum on the pseudo-gradient ``start - now``.

    ``momentum = momentum * mu + delta; step = (delta + momentum * mu) * lr; new = start - step``.
    The first step is ``1 + mu`` times a plain one, as in torch's SGD. Source: DiLoCo
    (arXiv 2311.08105) Algorithm 1; FoMoE uses lr 0.7, mu 0.9.

    ``carried`` has the momentum: what :meth:`step` writes counts when the meeting has succeeded.
    """

    def __init__(self, learning_rate: float, momentum: float, carried: Carried) -> None:
        self.learning_rate = learning_rate
        self.decay = momentum
        self.carried = carried

    @property
    def momentum(self) -> dict[str, Tensor]:
        """By the key of the piece, flat."""
        return self.carried.by_piece()

    def step(self, chunk: Chunk, delta: Tensor, work: Tensor) -> None:
        """Make of ``delta`` the step to subtract; ``work`` is memory of the same size."""
        # Products and sums are roundings of their own: one call for both might fuse them.
        previous, momentum = self.carried.before(chunk), self.carried.after(chunk)
        if previous is None:
            momentum.copy_(delta)
        else:
            torch.mul(previous, self.decay, out=momentum).add_(delta)
        delta.add_(torch.mul(momentum, self.decay, out=work)).mul_(self.learning_rate)

    def commit(self) -> None:
        self.carried.commit()
