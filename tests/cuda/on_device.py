# SPDX-License-Identifier: Apache-2.0
"""Tensors, results and CUDA graphs for tests that run on the CPU and on a GPU.

A test that takes `device` runs on both, on the CPU to show that the test itself is right. What only
a GPU can show has the mark `needs_cuda`: skipped elsewhere, with the reason.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from samples import SAMPLES, Sample, gradient_like
from torch import Tensor

import fomoe._C as _C

if not _C.compiled_with_cuda():
    REASON = "no CUDA kernels in this build"
else:
    REASON = "" if torch.cuda.is_available() else "no CUDA device"
needs_cuda = pytest.mark.skipif(bool(REASON), reason=REASON)
ON_BOTH = ["cpu", pytest.param("cuda", marks=needs_cuda)]

# Widths that the tensor cores take, beside those of the ops' own tests, which are odd.
WIDE = {"dim": 64, "expert_dim": 64}
EVEN_SAMPLES = [
    Sample(name="even widths", tokens=40, dim=64, expert_dim=32, residents=(4, 0, 5)),
    Sample(name="smallest even widths", dim=8, expert_dim=8),
    Sample(name="more than a tile", tokens=700, experts=5, top_k=2, dim=136, expert_dim=200),
    Sample(name="tiles in every axis", tokens=900, experts=3, top_k=2, dim=320, expert_dim=384),
    Sample(name="many small experts", tokens=64, experts=96, top_k=8, **WIDE),
    Sample(name="even, one expert gets everything", tokens=300, top_k=1, favourite=2, **WIDE),
    Sample(name="even, no tokens", tokens=0, **WIDE),
    Sample(name="even, one token", tokens=1, **WIDE),
    Sample(name="even, only ghosts", top_k=1, favourite=2, residents=(1, 3), **WIDE),
    Sample(name="even, a site without experts", residents=(), **WIDE),
    Sample(name="even, transposed memory", tokens=40, is_contiguous=False, **WIDE),
]
EVEN = EVEN_SAMPLES[0]

# Every sample on a GPU, two of them on the CPU.
CASES = [pytest.param("cpu", sample, id=f"cpu-{sample.name}") for sample in (SAMPLES[0], EVEN)] + [
    pytest.param("cuda", sample, id=f"cuda-{sample.name}", marks=needs_cuda)
    for sample in SAMPLES + EVEN_SAMPLES
]


def moved(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The tensors with their strides on the device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@functools.cache
def gradient_for(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: while a CUDA graph is captured, nothing can be copied from the host."""
    return gradient_like(torch.empty(shape, dtype=dtype, device=device))


def results_on(device: str, call: tuple[Callable, dict[str, Tensor]]) -> list[Tensor]:
    """Outputs, then a gradient for every floating point tensor, zero where none arrives."""
    function, tensors = call
    leaves = {
        name: tensor.to(device).detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    smooth = [output for output in outputs if output.requires_grad]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if smooth:
        given = [gradient_for(out.shape, out.dtype, out.device) for out in smooth]
        gradients = torch.autograd.grad(smooth, wanted, given, allow_unused=True)
    filled = (
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(wanted, gradients, strict=True)
    )
    return [tensor.detach() for tensor in (*outputs, *filled)]


def replayable(step: Callable[[], list[Tensor]], device: str) -> Callable[[], list[Tensor]]:
    """The step captured in a CUDA graph; on the CPU the step itself."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return [result.clone() for result in results]

    return replay
