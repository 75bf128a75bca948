# SPDX-License-Identifier: Apache-2.0
"""The layer shapes that are measured."""

from collections.abc import Sequence
from typing import NamedTuple

from fomoe.errors import UserError
from fomoe.ops.topk_gate import MAX_EXPERTS

# F.grouped_mm takes rows of whole 16 bytes only.
WIDTH_MULTIPLE = 8


class Shape(NamedTuple):
    """A Mixture-of-Experts layer with SwiGLU experts, and how many tokens it gets."""

    tokens: int
    dim: int
    expert_dim: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def expert_flops(self, *, backward: bool) -> int:
        """FLOPs of the experts' matrix products, as SonicMoE counts them: 6TKDF, or 18TKDF."""
        rows = self.tokens * self.top_k
        return (18 if backward else 6) * rows * self.dim * self.expert_dim


SHAPES = (
    Shape(2048, 512, 256, 64, 8),  # narrow experts, many of them: moving rows costs most
    Shape(2048, 512, 192, 128, 8),
    Shape(1024, 512, 1792, 8, 2),  # few wide ones: the matrix products cost most
    Shape(16, 512, 192, 128, 8),  # a decoding step: reading the weights costs most
    Shape(512, 576, 128, 12, 3),  # small, and no powers of two
)

# Of published models, with the tokens of a training step (docs/benchmarks.md names them).
CUDA_SHAPES = (
    Shape(32768, 2048, 768, 128, 8),  # Qwen3-30B-A3B
    Shape(32768, 2048, 1024, 64, 8),  # OLMoE-1B-7B
    Shape(16384, 7168, 2048, 32, 8),  # DeepSeek-V3, one of eight ranks
    Shape(24576, 1536, 256, 128, 8),  # SonicMoE 7B, n = 256
    Shape(16384, 2880, 2880, 32, 4),  # gpt-oss-20b
)


def parse_shape(text: str) -> Shape:
    """``T,D,F,E,K`` as a shape.

    Raises
    ------
    UserError
        When the text is not five positive integers with K <= E <= 4096 and widths D and F that all
        contenders take.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != len(Shape._fields) or min(sizes) < 1:
        raise UserError(
            f"--shape: expected five positive integers T,D,F,E,K such as {SHAPES[0]}, got {text!r}"
        )
    shape = Shape(*sizes)
    if not shape.top_k <= shape.num_experts <= MAX_EXPERTS:
        raise UserError(f"--shape: expected K <= E <= {MAX_EXPERTS}, got {text!r}")
    if shape.dim % WIDTH_MULTIPLE or shape.expert_dim % WIDTH_MULTIPLE:
        raise UserError(
            f"--shape: expected D and F in multiples of {WIDTH_MULTIPLE}, which F.grouped_mm needs "
            f"(fomoe does not), got {text!r}"
        )
    return shape


def parse_shapes(texts: Sequence[str], device: str = "cpu") -> tuple[Shape, ...]:
    """The shapes of these texts; without any, the standard ones of the device."""
    standard = CUDA_SHAPES if device == "cuda" else SHAPES
    return tuple(dict.fromkeys(map(parse_shape, texts))) or standard
