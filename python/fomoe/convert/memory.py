# SPDX-License-Identifier: Apache-2.0
"""How much memory a conversion takes at most, from shapes alone."""

from dataclasses import dataclass

from fomoe.convert.methods import METHODS
from fomoe.convert.settings import Conversion, expert_shape
from fomoe.convert.sinkhorn import ITERATIONS
from fomoe.models import DecoderConfig, parameter_count
from fomoe.units import human_bytes

_FLOAT = 4  # bytes: layers are aligned in float32
_BATCH_COPIES = 6  # of (B, H): hidden, masked, gradients, curvature
_LOGIT_COPIES = 6  # of both models, their softmaxes, and the gradient


@dataclass(kw_only=True, slots=True, frozen=True)
class Memory:
    """Bytes on the device, by what they are for; the largest stage decides."""

    weights: int  # the dense model, and the converted feed-forwards beside it
    stream: int  # residual stream of all calibration tokens
    layer: int  # one layer: its inputs, what its neurons put out, its matrices
    assignment: int  # transport plan with its gradient, or inner products of the experts
    end_to_end: int  # gradients, optimiser and activations of the stages after alignment

    @property
    def total(self) -> int:
        return self.weights + max(self.stream + self.layer + self.assignment, self.end_to_end)

    def __str__(self) -> str:
        parts = ("weights", "stream", "layer", "assignment", "end_to_end")
        said = ", ".join(f"{p.replace('_', ' ')} {human_bytes(getattr(self, p))}" for p in parts)
        return f"{human_bytes(self.total)} ({said})"


def memory_estimate(config: DecoderConfig, conversion: Conversion, element_size: int) -> Memory:
    """An upper bound for a dense model of shape ``config`` with ``element_size`` bytes a weight."""
    shape = expert_shape(config, conversion)
    parameters = parameter_count(config)
    dim, width, experts = config.dim, config.dense_dim, shape.num_experts
    tokens = conversion.tokens + conversion.held_out_tokens + 2 * conversion.sequence_length
    batch = min(conversion.batch_size, tokens)
    matrices = 4 * dim * width + width * shape.size  # float32, one in the order of the experts
    inner_products = conversion.held_out_tokens * experts**2
    assignment = inner_products
    method = METHODS[conversion.method]
    if method.learned:
        assignment = max(assignment, (2 * ITERATIONS + 8) * width * experts)
    elif method.routed:
        assignment += conversion.tokens * experts**2
    return Memory(
        weights=element_size * (parameters.total + parameters.dense),
        stream=element_size * tokens * dim,
        layer=_FLOAT * (tokens * (3 * dim + width) + matrices + _BATCH_COPIES * batch * width),
        assignment=_FLOAT * assignment,
        end_to_end=_end_to_end(config, conversion),
    )


def _end_to_end(config: DecoderConfig, conversion: Conversion) -> int:
    """Weights in float32, their gradients and two moments; activations of one batch."""
    if not conversion.distill_steps and not conversion.fine_tune_steps:
        return 0
    total = parameter_count(config).total
    tokens = max(conversion.batch_size, conversion.sequence_length)
    activations = config.num_layers * (12 * config.dim + 4 * config.dense_dim)
    logits = _LOGIT_COPIES * config.vocab_size
    return _FLOAT * (4 * total + tokens * (activations + logits))
