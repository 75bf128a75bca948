# SPDX-License-Identifier: Apache-2.0
"""What happens to the mean of the sites' contributions (FoMoE Algorithm 1, OuterOpt).

The owner of a tensor takes the step once and sends the result, so that all holders agree on any
hardware. State is kept per piece: an expert's tensor, or the owner's shard of the shared tensors.
"""

from typing import Protocol

from torch import Tensor

__all__ = ["Average", "Nesterov", "OuterOptimizer"]


class OuterOptimizer(Protocol):
    """``contribution`` on every holder, ``reduce`` on the owner, ``result`` on every holder.

    ``reduce`` leaves ``momentum`` as it is; ``commit`` takes the new values over, together with the
    parameters, when a meeting has succeeded.
    """

    momentum: dict[str, Tensor]
    needs_start: bool

    def contribution(self, start: Tensor | None, now: Tensor) -> Tensor: ...

    def reduce(self, name: str, mean: Tensor) -> Tensor: ...

    def result(self, start: Tensor | None, received: Tensor) -> Tensor: ...

    def commit(self) -> None: ...


class Nesterov:
    """DiLoCo's outer SGD with Nesterov momentum on the pseudo-gradient ``start - now``.

    ``momentum = momentum * mu + delta; step = (delta + momentum * mu) * lr; new = start - step``.
    The first step is ``1 + mu`` times a plain one, as in torch's SGD. Source: DiLoCo
    (arXiv 2311.08105) Algorithm 1; FoMoE uses lr 0.7, mu 0.9.
    """

    needs_start = True

    def __init__(self, learning_rate: float, momentum: float) -> None:
        self.learning_rate = learning_rate
        self.decay = momentum
        self.momentum: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def contribution(self, start: Tensor | None, now: Tensor) -> Tensor:
        assert start is not None
        return start - now

    def reduce(self, name: str, mean: Tensor) -> Tensor:
        """The step to subtract, same shape as ``mean``."""
        previous = self.momentum.get(name)
        momentum = mean.clone() if previous is None else previous * self.decay + mean
        self._next[name] = momentum
        return (mean + momentum * self.decay) * self.learning_rate

    def result(self, start: Tensor | None, received: Tensor) -> Tensor:
        assert start is not None
        return start - received

    def commit(self) -> None:
        self.momentum, self._next = self.momentum | self._next, {}


class Average:
    """Plain averaging of the parameters; it never forms ``start - (start - now)``, which rounds."""

    needs_start = False

    def __init__(self) -> None:
        self.momentum: dict[str, Tensor] = {}

    def contribution(self, start: Tensor | None, now: Tensor) -> Tensor:
        return now

    def reduce(self, name: str, mean: Tensor) -> Tensor:
        return mean

    def result(self, start: Tensor | None, received: Tensor) -> Tensor:
        return received

    def commit(self) -> None:
        pass
