# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer against what else computes it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe.bench.agreement import Agreement, check_agreement
from fomoe.bench.baselines import OURS, Contender, build_contenders
from fomoe.bench.machine import DTYPES, GEMM_FLOPS, gemm
from fomoe.bench.shapes import Shape
from fomoe.bench.timing import Call, Plan, interleave, paired_ratio, spread

PASSES = ("forward", "forward+backward")
_GEMM = "torch.mm"  # as many FLOPs, in the same turns: the ceiling as it is at that moment


class Batch(NamedTuple):
    x: Tensor  # (T, D)
    grad_y: Tensor  # (T, D)


def measure_layers(
    shapes: Sequence[Shape], dtypes: Sequence[str], plan: Plan, progress: Callable[[str], object]
) -> Iterator[list[dict[str, Any]]]:
    """The records of one case after the other: of each contender, ours first."""
    for shape in shapes:
        for dtype in dtypes:
            progress(f"{shape} {dtype} agreement")
            contenders = build_contenders(shape, DTYPES[dtype])
            agreements = check_agreement(contenders, shape.top_k)
            for name in PASSES:
                progress(f"{shape} {dtype} {name}")
                flops = shape.expert_flops(backward=name != "forward")
                num_gemms = max(1, round(flops / GEMM_FLOPS))
                prepare = _prepare_forward if name == "forward" else _prepare_training
                calls = {key: prepare(contender) for key, contender in contenders.items()}
                calls[_GEMM] = _prepare_gemms(DTYPES[dtype], num_gemms)
                times = interleave(calls, _drawing(shape, DTYPES[dtype]), plan)
                case = {"shape": shape._asdict(), "dtype": dtype, "pass": name}
                yield _records(case, times, agreements, flops / (num_gemms * GEMM_FLOPS))


def _drawing(shape: Shape, dtype: torch.dtype) -> Callable[[], Batch]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Batch:
        size = (2, shape.tokens, shape.dim)
        return Batch(*torch.randn(size, generator=generator).to(dtype).unbind())

    return draw


def _records(
    case: Mapping[str, Any],
    times: Mapping[str, list[float]],
    agreements: Mapping[str, Agreement],
    flops_per_gemm_flop: float,
) -> list[dict[str, Any]]:
    records = []
    for name, agreement in agreements.items():
        seconds = times[name]
        own, ratio = spread(seconds), paired_ratio(seconds, times[OURS])
        gemm_time = paired_ratio(times[_GEMM], seconds).median
        records.append(
            {
                **case,
                "contender": name,
                "repetitions": len(seconds),
                "median_ms": own.median * 1e3,
                "quartiles_ms": [own.low * 1e3, own.high * 1e3],
                "best_ms": own.best * 1e3,
                "ratio": ratio.median,
                "ratio_quartiles": [ratio.low, ratio.high],
                "gemm_share": gemm_time * flops_per_gemm_flop,
                "agreement": agreement._asdict(),
            }
        )
    return records


def _prepare_forward(contender: Contender) -> Callable[[Batch], Call]:
    def prepare(batch: Batch) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return contender.forward(batch.x)

        return call

    return prepare


def _prepare_gemms(dtype: torch.dtype, count: int) -> Callable[[Batch], Call]:
    product = gemm(dtype)

    def call() -> None:
        for _ in range(count):
            product()

    return lambda batch: call


def _prepare_training(contender: Contender) -> Callable[[Batch], Call]:
    def prepare(batch: Batch) -> Call:
        x = batch.x.detach().requires_grad_()  # of each contender: it collects the gradient
        for parameter in contender.parameters:
            parameter.grad = None

        def call() -> None:
            torch.autograd.backward(contender.forward(x), batch.grad_y)

        return call

    return prepare
