# SPDX-License-Identifier: Apache-2.0
"""One dense SwiGLU feed-forward, its inputs, and what groups of its neurons contribute.

T tokens, D model width, H neurons, E experts, F neurons of an expert (H = E * F).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 4096  # tokens


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """y = down @ (silu(gate @ x) * (up @ x)); gate and up (H, D), down (D, H), one float dtype."""

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def num_neurons(self) -> int:
        return self.gate.shape[0]

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What each neuron puts out, (T, H)."""
        return F.silu(F.linear(x_TD, self.gate)) * F.linear(x_TD, self.up)

    @cached_property
    def down_norms(self) -> Tensor:
        """|down_i|^2, (H,)."""
        return self.down.square().sum(0)


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """The weights and the inputs (T, D) that calibration text gave the layer."""

    weights: DenseWeights
    inputs: Tensor
    _products: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def hidden(self) -> Tensor:
        """What each neuron puts out on the inputs, (T, H)."""
        out = self.inputs.new_empty(len(self.inputs), self.weights.num_neurons)
        for at in chunks(len(self.inputs)):
            out[at] = self.weights.hidden(self.inputs[at])
        return out

    @cached_property
    def importance(self) -> Tensor:
        """mean over tokens of h^2 |down_i|^2, (H,): what is lost when neuron i alone goes."""
        return self.hidden.square().mean(0) * self.weights.down_norms

    @cached_property
    def output_squares(self) -> Tensor:
        """Squared length of the layer's output, (T,)."""
        out = self.inputs.new_empty(len(self.inputs))
        for at in chunks(len(self.inputs)):
            out[at] = (self.hidden[at] @ self.weights.down.T).square().sum(1)
        return out

    @cached_property
    def input_scale(self) -> float:
        """Root mean square of the inputs."""
        return float(self.inputs.square().mean().sqrt())

    def expert_products(self, expert_H: Tensor, num_experts: int) -> Tensor:
        """Inner products of the experts' contributions, (T, E, E).

        With these, the squared error of any choice of experts needs no neurons: it is
        off^T products off, where off is 1 for an expert that is left out. Those of the last
        assignment are kept, as several routers may be trained for it.
        """
        key = tuple(expert_H.tolist())
        if key not in self._products:
            self._products.clear()
            self._products[key] = self._expert_products(expert_H, num_experts)
        return self._products[key]

    def _expert_products(self, expert_H: Tensor, num_experts: int) -> Tensor:
        order = expert_H.argsort(stable=True)
        width = len(order) // num_experts
        down_EFD = self.weights.down.T[order].view(num_experts, width, -1)
        out = self.inputs.new_empty(len(self.inputs), num_experts, num_experts)
        for at in chunks(len(self.inputs), _CHUNK // 4):
            hidden_TEF = self.hidden[at][:, order].view(-1, num_experts, width)
            parts_TED = torch.bmm(hidden_TEF.transpose(0, 1), down_EFD).transpose(0, 1)
            out[at] = parts_TED @ parts_TED.mT
        return out


def chunks(length: int, size: int = _CHUNK) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``length``."""
    for begin in range(0, length, size):
        yield slice(begin, min(begin + size, length))
