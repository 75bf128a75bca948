# SPDX-License-Identifier: Apache-2.0
"""The contenders are equal in what they compute, and the check that says so can fail."""

import sys

import pytest
import torch

from fomoe.bench.agreement import check_agreement
from fomoe.bench.baselines import HUGGING_FACE, build_contenders
from fomoe.bench.shapes import Shape

SHAPE = Shape(tokens=8, dim=24, expert_dim=16, num_experts=8, top_k=2)
WIDE = Shape(tokens=8, dim=16, expert_dim=32, num_experts=4, top_k=4)


def test_all_four_are_there_and_ours_is_first():
    names = list(build_contenders(SHAPE, torch.float32))
    assert names == ["fomoe", "torch", "hf_eager", "hf_grouped_mm"]


@pytest.mark.parametrize("shape", [SHAPE, WIDE])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_agree_with_float64(shape: Shape, dtype: torch.dtype, most: float):
    contenders = build_contenders(shape, dtype)
    agreements = check_agreement(contenders, shape.top_k)
    assert list(agreements) == list(contenders)
    for agreement in agreements.values():
        assert max(agreement.output, agreement.gradient) < most <= agreement.tolerance
    if dtype == torch.bfloat16:
        assert min(agreement.gradient for agreement in agreements.values()) > 1e-4


@pytest.mark.parametrize("name", ["torch", *(f"hf_{name}" for name in HUGGING_FACE)])
def test_a_contender_with_other_weights_is_named(name: str):
    contenders = build_contenders(SHAPE, torch.float32)
    with torch.no_grad():
        contenders[name].parameters[2][3] *= 1.01
    with pytest.raises(RuntimeError, match=rf"^{name} does not agree with the float64 reference"):
        check_agreement(contenders, SHAPE.top_k)


def test_a_contender_that_gives_nan_is_named():
    contenders = build_contenders(SHAPE, torch.float32)
    with torch.no_grad():
        contenders["torch"].parameters[1][0] = torch.nan
    with pytest.raises(RuntimeError, match=r"^torch does not agree"):
        check_agreement(contenders, SHAPE.top_k)


def test_without_transformers_the_others_remain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert list(build_contenders(SHAPE, torch.float32)) == ["fomoe", "torch"]
