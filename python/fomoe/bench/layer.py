# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Experts layer against what else computes it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomoe.bench.agreement import Agreement, check_agreement
from fomoe.bench.baselines import OURS, build_contenders
from fomoe.bench.clock import Call, clock_of
from fomoe.bench.contender import Contender
from fomoe.bench.machine import DTYPES, gemm, gemm_flops
from fomoe.bench.shapes import Shape
from fomoe.bench.third_party import build_third_party, first_line
from fomoe.bench.timing import Plan, interleave, paired_ratio, spread

PASSES = ("forward", "forward+backward")
_GEMM = "torch.mm"  # as many FLOPs, in the same turns: the ceiling as it is at that moment


class Batch(NamedTuple):
    x: Tensor  # (T, D)
    grad_y: Tensor  # (T, D)


def measure_layers(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    plan: Plan,
    progress: Callable[[str], object],
    device: torch.device,
) -> Iterator[list[dict[str, Any]]]:
    """The records of one case after the other: of each contender, ours first."""
    clock, flops_of_gemm = clock_of(device), gemm_flops(device)
    for shape in shapes:
        for dtype in dtypes:
            progress(f"{shape} {dtype} agreement")
            contenders, agreements, missing = _agreeing(shape, DTYPES[dtype], device)
            draw = _drawing(shape, DTYPES[dtype], device)
            for name in PASSES:
                progress(f"{shape} {dtype} {name}")
                flops = shape.expert_flops(backward=name != "forward")
                num_gemms = max(1, round(flops / flops_of_gemm))
                prepare = _prepare_forward if name == "forward" else _prepare_training
                calls = {key: prepare(contender) for key, contender in contenders.items()}
                calls[_GEMM] = _prepare_gemms(DTYPES[dtype], num_gemms, device)
                times = interleave(calls, draw, plan, clock)
                case = {"shape": shape._asdict(), "dtype": dtype, "pass": name, "missing": missing}
                records = _records(case, times, agreements, flops / (num_gemms * flops_of_gemm))
                if device.type == "cuda" and name != "forward":
                    for record in records:
                        kept = activation_bytes(contenders[record["contender"]], draw().x)
                        record["activation_mib"] = kept / 2**20
                yield records
            for contender in contenders.values():
                for parameter in contender.parameters:
                    parameter.grad = None


def _agreeing(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Contender], dict[str, Agreement], dict[str, str]]:
    """Contenders, their agreement, and which others are missing and why."""
    contenders = build_contenders(shape, dtype, device=device)
    if device.type == "cpu":
        return contenders, check_agreement(contenders, shape.top_k), {}
    # On a GPU, what others do is theirs: without one that fails, the rest is measured all the same.
    ours = contenders.pop(OURS)
    router, w1, w2 = ours.parameters
    third_party, missing = build_third_party(shape, (router, w1, w2))
    agreements = check_agreement({OURS: ours}, shape.top_k)
    agreeing = {OURS: ours}
    for name, contender in (contenders | third_party).items():
        try:
            agreements |= check_agreement({OURS: ours, name: contender}, shape.top_k)
            agreeing[name] = contender
        except Exception as error:  # foreign code may fail in any way
            missing[name] = first_line(error)
    return agreeing, agreements, missing


def activation_bytes(
    contender: Contender, x: Tensor, allocated: Callable[[], int] = torch.cuda.memory_allocated
) -> int:
    """Bytes that a forward leaves allocated for its backward, the output included."""
    for parameter in contender.parameters:
        parameter.grad = None
    leaf = x.detach().requires_grad_()
    with torch.no_grad():
        contender.forward(leaf)  # so that nothing is allocated for the first time
    before = allocated()
    y = contender.forward(leaf)
    rise = allocated() - before
    del y
    return rise


def _drawing(shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], Batch]:
    generator = torch.Generator(device).manual_seed(1)

    def draw() -> Batch:
        size = (2, shape.tokens, shape.dim)
        return Batch(*torch.randn(size, generator=generator, device=device).to(dtype).unbind())

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


def _prepare_gemms(dtype: torch.dtype, count: int, device: torch.device) -> Callable[[Batch], Call]:
    product = gemm(dtype, device)

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
