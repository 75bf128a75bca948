# SPDX-License-Identifier: Apache-2.0
"""Soft assignment of neurons to experts of equal size: entropic optimal transport.

H neurons, E experts.
"""

import math

from torch import Tensor

ITERATIONS = 50


def sinkhorn(logits_HE: Tensor, capacity: int, iterations: int = ITERATIONS) -> Tensor:
    """The plan exp(logits + u + v) whose rows sum to 1 and whose columns go to ``capacity``.

    In the log domain, so that sharp logits neither overflow nor vanish. The row update comes last:
    rows sum to 1 whatever the number of iterations, columns as far as the iteration has converged.
    Differentiable through every iteration. Source: DOT-MoE (arXiv 2606.01666) equation 7.

    Parameters
    ----------
    logits_HE : Tensor, (H, E), float64 | float32
        Affinity / temperature.
    capacity : int
        Neurons of one expert, H / E.

    Returns
    -------
    Tensor, (H, E), dtype of the logits

    Raises
    ------
    ValueError
        If E times ``capacity`` is not H.
    """
    require_capacity("sinkhorn", logits_HE, capacity)
    # Neurons along the rows in memory: both reductions then run over contiguous vectors.
    logits_EH = logits_HE.T.contiguous()
    columns = logits_EH.new_zeros(logits_EH.shape[0], 1)
    for _ in range(iterations):
        rows = (logits_EH + columns).logsumexp(0, keepdim=True)
        columns = math.log(capacity) - (logits_EH - rows).logsumexp(1, keepdim=True)
    return (logits_EH + columns).softmax(0).T


def require_capacity(name: str, scores_HE: Tensor, capacity: int) -> None:
    """Raise ValueError unless the experts, (H, E), hold every neuron and have no place left."""
    num_neurons, num_experts = scores_HE.shape
    if num_neurons != num_experts * capacity:
        raise ValueError(
            f"{name}: expected {num_experts} experts x {capacity} neurons = {num_neurons}, "
            f"got {num_experts * capacity}"
        )
