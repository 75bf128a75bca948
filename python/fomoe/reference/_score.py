# SPDX-License-Identifier: Apache-2.0
"""The bits of ``csrc/include/fomoe/score.h`` in plain torch, which has no fused multiply-add.

torch's own sigmoid may differ from that header's in the last place, and a last place decides which
expert is chosen.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True, frozen=True)
class _Steps:
    bits: torch.dtype
    mantissa_bits: int
    exponent_bias: int
    limit: float  # the sigmoid is 0 below -limit
    log2: float  # log(2) in this dtype, and what is missing
    log2_rest: float
    degree: int


_STEPS = {
    torch.float32: _Steps(
        bits=torch.int32,
        mantissa_bits=23,
        exponent_bias=127,
        limit=87.0,
        log2=float.fromhex("0x1.62e430p-1"),
        log2_rest=float.fromhex("-0x1.05c610p-29"),
        degree=7,
    ),
    torch.float64: _Steps(
        bits=torch.int64,
        mantissa_bits=52,
        exponent_bias=1023,
        limit=708.0,
        log2=math.log(2),
        log2_rest=float.fromhex("0x1.abc9e3b39803fp-56"),
        degree=13,
    ),
}


def sigmoid_limit(dtype: torch.dtype) -> float:
    """The sigmoid of float32 or float64 logits is 0 below minus this."""
    return _STEPS[dtype].limit


def sigmoid_bits(x: Tensor) -> Tensor:
    """``fomoe::sigmoid`` of float32 or float64 values, without a gradient."""
    steps = _STEPS[x.dtype]

    def constant(value: float) -> Tensor:
        return torch.full_like(x, value)

    z = (-x).clamp(-steps.limit, steps.limit)
    shift = 1.5 * 2.0**steps.mantissa_bits
    shifted = _fused_multiply_add(z, constant(1 / math.log(2)), constant(shift))
    exponent = shifted - shift
    r = _fused_multiply_add(exponent, constant(-steps.log2), z)
    r = _fused_multiply_add(exponent, constant(-steps.log2_rest), r)
    exponential = constant(1 / math.factorial(steps.degree))
    for power in range(steps.degree - 1, -1, -1):
        exponential = _fused_multiply_add(exponential, r, constant(1 / math.factorial(power)))
    biased = exponent.nan_to_num().to(steps.bits) + steps.exponent_bias
    power_of_two = (biased << steps.mantissa_bits).view(x.dtype)
    denominator = exponential * power_of_two + 1  # the product is exact
    return torch.where(x < -steps.limit, 0, 1 / denominator)


def _fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with one rounding (Boldo and Melquiond 2008, doi 10.1109/TC.2007.70819, fig. 5)."""
    product, product_rest = _exact_product(a, b)
    low, low_rest = _exact_sum(c, product_rest)
    high, high_rest = _exact_sum(product, low)
    return high + _sum_rounded_to_odd(low_rest, high_rest)


def _exact_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as a rounded sum and its error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _exact_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a * b as a rounded product and its error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    rest = a_high * b_high - product + a_high * b_low + a_low * b_high + a_low * b_low
    return product, rest


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """a as a sum of two values of half its digits (Veltkamp)."""
    scaled = a * (2.0 ** ((_STEPS[a.dtype].mantissa_bits + 2) // 2) + 1)
    high = scaled - (scaled - a)
    return high, a - high


def _sum_rounded_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where an inexact sum becomes the neighbour with an odd last bit."""
    total, rest = _exact_sum(a, b)
    bits = total.view(_STEPS[a.dtype].bits)
    is_even_and_inexact = (rest != 0) & (bits & 1 == 0)
    towards_rest = torch.where((rest > 0) == (total > 0), 1, -1).to(bits.dtype)
    return torch.where(is_even_and_inexact, bits + towards_rest, bits).view(a.dtype)
