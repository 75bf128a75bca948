# SPDX-License-Identifier: Apache-2.0
"""Inputs that the tests of all ops share, and how results are compared."""

import dataclasses

import torch
from torch import Tensor

from fomoe import reference
from fomoe.ops import Routing

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# For results that are rounded once to the dtype; some five times what the tests' sums come to.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


@dataclasses.dataclass(kw_only=True, frozen=True)
class Sample:
    """A layer and a batch: T tokens, E experts, K choices, D width, F expert width."""

    name: str
    tokens: int = 13
    experts: int = 7
    top_k: int = 3
    dim: int = 17
    expert_dim: int = 11
    residents: tuple[int, ...] | None = None  # all
    favourite: int | None = None  # the expert that every token chooses first
    is_contiguous: bool = True

    @property
    def resident_ids(self) -> tuple[int, ...]:
        return tuple(range(self.experts)) if self.residents is None else self.residents

    @property
    def num_local_experts(self) -> int:
        return len(self.resident_ids)

    def expert_map(self) -> Tensor:
        result = torch.full((self.experts,), -1, dtype=torch.int32)
        for local, expert in enumerate(self.resident_ids):
            result[expert] = local
        return result

    def logits(self, dtype: torch.dtype) -> Tensor:
        logits = self.random(self.tokens, self.experts, seed=1)
        if self.favourite is not None:
            logits[:, self.favourite] += 10
        return logits.to(dtype)

    def ids(self) -> Tensor:
        return reference.topk_gate(self.logits(torch.float64), self.top_k).ids

    def routing(self) -> Routing:
        return reference.route(self.ids(), self.expert_map(), self.num_local_experts)

    def random(self, *shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal values; in transposed memory for a non-contiguous sample."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_contiguous or len(shape) < 2:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return torch.randn(swapped, generator=generator, dtype=torch.float64).to(dtype).mT

    def rows(self, dtype: torch.dtype, width: int) -> Tensor:
        return self.random(self.tokens * self.top_k, width, seed=2, dtype=dtype)

    def x(self, dtype: torch.dtype) -> Tensor:
        return self.random(self.tokens, self.dim, seed=3, dtype=dtype)

    def weights(self, dtype: torch.dtype) -> Tensor:
        return self.random(self.tokens, self.top_k, seed=4, dtype=sum_dtype(dtype))

    def pre_dim(self, activation: str) -> int:
        return self.expert_dim * (1 if activation == "silu" else 2)

    def w1(self, dtype: torch.dtype, activation: str = "swiglu") -> Tensor:
        w1 = self.random(self.num_local_experts, self.pre_dim(activation), self.dim, seed=5)
        return (w1 / self.dim**0.5).to(dtype)

    def w2(self, dtype: torch.dtype) -> Tensor:
        w2 = self.random(self.num_local_experts, self.dim, self.expert_dim, seed=6)
        return (w2 / self.expert_dim**0.5).to(dtype)

    def b1(self, dtype: torch.dtype, activation: str = "swiglu") -> Tensor:
        shape = (self.num_local_experts, self.pre_dim(activation))
        return 4 * self.random(*shape, seed=7, dtype=dtype)  # beyond the clamp's limit at times

    def b2(self, dtype: torch.dtype) -> Tensor:
        return self.random(self.num_local_experts, self.dim, seed=8, dtype=dtype)


SAMPLES = [
    Sample(name="some ghosts", residents=(4, 0, 5)),
    Sample(name="no tokens", tokens=0),
    Sample(name="one token", tokens=1),
    Sample(name="only ghosts are chosen", top_k=1, favourite=2, residents=(1, 3)),
    Sample(name="a site without experts", residents=()),
    Sample(name="one expert gets everything", top_k=1, favourite=2),
    Sample(name="every expert is chosen", top_k=7),
    Sample(name="one choice", top_k=1),
    Sample(name="one expert", experts=1, top_k=1),
    Sample(name="width one", dim=1, expert_dim=1),
    Sample(name="not contiguous", is_contiguous=False),
    Sample(name="vector width and more", tokens=150, experts=40, top_k=35, dim=70, expert_dim=33),
]
SAMPLE = SAMPLES[0]


def name_of(value: object) -> str | None:
    """For pytest's ids."""
    if isinstance(value, Sample):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def leaf(tensor: Tensor) -> Tensor:
    """A leaf of its own graph with the strides of ``tensor``."""
    return tensor.clone(memory_format=torch.preserve_format).requires_grad_()


def gradient_of(tensor: Tensor) -> Tensor:
    """Zeros where the reference's graph does not reach the tensor."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def gradient_like(tensor: Tensor, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return values.to(tensor.device, tensor.dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Equal dtypes and shapes; errors within the tolerance, relative to the largest value."""
    assert actual.dtype == expected.dtype
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    tolerance = TOLERANCES[dtype] * scale
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(size, 1e-3))
