# SPDX-License-Identifier: Apache-2.0
"""What happens to the mean of the sites' contributions (FoMoE Algorithm 1, OuterOpt).

The owner of a piece takes the step once and sends the result, so that all holders agree on any
hardware.
"""

from torch import Tensor

__all__ = ["Nesterov"]


class Nesterov:
    """DiLoCo's outer SGD with Nesterov momentum on the pseudo-gradient ``start - now``.

    ``momentum = momentum * mu + delta; step = (delta + momentum * mu) * lr; new = start - step``.
    The first step is ``1 + mu`` times a plain one, as in torch's SGD. Source: DiLoCo
    (arXiv 2311.08105) Algorithm 1; FoMoE uses lr 0.7, mu 0.9.

    ``momentum`` is by the key of the piece; :meth:`step` leaves it as it is and puts the new value
    into ``next``, which :meth:`commit` takes over when the meeting has succeeded.
    """

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self.learning_rate = learning_rate
        self.decay = momentum
        self.momentum: dict[str, Tensor] = {}
        self.next: dict[str, Tensor] = {}

    def step(self, key: str, delta: Tensor) -> Tensor:
        """The step to subtract, same shape as ``delta``."""
        previous = self.momentum.get(key)
        momentum = delta.clone() if previous is None else previous * self.decay + delta
        self.next[key] = momentum
        return (delta + momentum * self.decay) * self.learning_rate

    def commit(self) -> None:
        self.momentum, self.next = self.momentum | self.next, {}
