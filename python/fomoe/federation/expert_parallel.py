# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism across sites: tokens travel to the one site of every expert, at every step.

The baseline that the FoMoE paper (arXiv 2606.19025) has no number for. What all sites compute
together is one model on one batch, so its gradients are those of a single process.
"""

import math
import struct
from collections.abc import Sequence

from torch import Tensor, nn

from fomoe.comm import ExpertExchange
from fomoe.comm import Transport as TokenTransport
from fomoe.errors import UserError
from fomoe.federation.exchange import Transport
from fomoe.federation.ledger import SiteLedger
from fomoe.federation.placement import Placement
from fomoe.federation.task import ExpertParallelTask, Task
from fomoe.nn import ModelTensor

__all__ = ["ExpertParallelism", "expert_parallel_model"]


def expert_parallel_model(
    task: Task, exchanges: Sequence[ExpertExchange], setting: str
) -> nn.Module:
    """The task's model with an exchange per layer, which ``setting`` asks for.

    Raises
    ------
    UserError
        The task has no such model.
    """
    if not isinstance(task, ExpertParallelTask):
        raise UserError(
            f"{setting} needs a task with build_expert_parallel_model, got {type(task).__name__}"
        )
    return task.build_expert_parallel_model(exchanges)


class ExpertParallelism:
    """One site's part in it.

    Parameters
    ----------
    tokens : TokenTransport
        How rows of tokens travel; a site is a rank of it.
    transport : Transport
        The site's way to the others, for a few numbers a step.
    ledger : SiteLedger
    """

    def __init__(self, tokens: TokenTransport, transport: Transport, ledger: SiteLedger) -> None:
        self.tokens = tokens
        self.transport = transport
        self.ledger = ledger
        self.exchanges: Sequence[ExpertExchange] = ()
        self._weight = 1.0
        self._counted = 0

    def build(self, task: Task, placement: Placement) -> nn.Module:
        """The model of this site, whose layers send tokens to the others.

        Raises
        ------
        UserError
            The task has no such model.
        """
        self.exchanges = [
            ExpertExchange(self.tokens, [holders[0] for holders in layer])
            for layer in placement.table
        ]
        return expert_parallel_model(task, self.exchanges, "federation.strategy = 'ep'")

    def objective(self, loss: Tensor, num_tokens: int) -> Tensor:
        """The site's share of the mean loss over all tokens, times the number of sites."""
        counts = [count for (count,) in self._gather(num_tokens)]
        self._weight = num_tokens * len(counts) / sum(counts)
        return loss * self._weight

    def finish_gradients(self, tensors: Sequence[ModelTensor]) -> None:
        """After the backward: gradients as if every site had all tokens that concern it.

        Those of experts are final. Those of other tensors are this site's, for a mean that weighs
        sites by their tokens.
        """
        divided = set()
        for tensor in tensors:
            gradient = tensor.parameter.grad
            if gradient is not None and id(tensor.parameter) not in divided:
                gradient /= self._weight if tensor.on_every_site else self.transport.sites
                divided.add(id(tensor.parameter))

    def clip(self, tensors: Sequence[ModelTensor], max_norm: float) -> None:
        """Scale the gradients so that the norm over the whole model is at most ``max_norm``."""
        gradients: dict[int, Tensor] = {}
        squares = {True: 0.0, False: 0.0}
        for tensor in tensors:
            gradient = tensor.parameter.grad
            if gradient is not None and id(tensor.parameter) not in gradients:
                gradients[id(tensor.parameter)] = gradient
                squares[tensor.on_every_site] += gradient.double().square().sum().item()
        # Python sums what all sites know in one order, so that all scale alike.
        total = squares[True] + sum(_float(bits) for (bits,) in self._gather(_bits(squares[False])))
        factor = min(1.0, max_norm / (math.sqrt(total) + 1e-6))  # as torch's clip_grad_norm_
        if factor < 1:
            for gradient in gradients.values():
                gradient *= factor

    def count(self) -> None:
        """Enter the rows that have crossed to other sites since the last call into the ledger."""
        total = sum(exchange.bytes_sent["inter_site"] for exchange in self.exchanges)
        self.ledger.sent("activations", total - self._counted)
        self._counted = total

    @property
    def seconds(self) -> float:
        """Spent on the way of tokens since the start, waiting for slower sites included."""
        return sum(exchange.seconds for exchange in self.exchanges)

    def _gather(self, value: int) -> list[list[int]]:
        self.ledger.sent("tokens", 8 * (self.transport.sites - 1))
        return self.transport.gather([value])


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _float(bits: int) -> float:
    (value,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(value)
