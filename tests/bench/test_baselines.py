# SPDX-License-Identifier: Apache-2.0
"""The contenders are equal in what they compute, and the check that says so can fail."""

import sys

import pytest
import torch

from fomoe.bench.agreement import check_agreement
from fomoe.bench.baselines import (
    HUGGING_FACE,
    _group_on_gpu,
    build_contenders,
    group_by_expert,
)
from fomoe.bench.contender import Contender
from fomoe.bench.layer import Batch, _prepare_forward, _prepare_training, activation_bytes
from fomoe.bench.shapes import Shape
from fomoe.errors import UserError

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


@pytest.mark.parametrize("shape", [SHAPE, WIDE])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-6), (torch.bfloat16, 1.5e-2)])
def test_so_do_those_that_are_worth_their_time_on_gpus_only(
    shape: Shape, dtype: torch.dtype, most: float
):
    contenders = build_contenders(shape, dtype, of_gpus=True)
    assert list(contenders)[:4] == ["fomoe", "torch", "torch_gather", "torch_loop"]
    agreements = check_agreement(contenders, shape.top_k)
    for name in ("torch_gather", "torch_loop"):
        assert max(agreements[name].output, agreements[name].gradient) < most


def test_slots_are_grouped_alike_without_a_bincount():
    ids = torch.tensor([[3, 0], [3, 1], [0, 3]])
    for slots, ends in (group_by_expert(ids, 5), _group_on_gpu(ids.flatten(), 5)):
        assert ends.dtype == torch.int32
        assert ends.tolist() == [2, 3, 3, 6, 6]
        assert sorted(slots[:2].tolist()) == [1, 4]
        assert slots[2] == 3
        assert sorted(slots[3:].tolist()) == [0, 2, 5]


@pytest.mark.parametrize("name", ["torch", *(f"hf_{name}" for name in HUGGING_FACE)])
def test_a_contender_with_other_weights_is_named(name: str):
    contenders = build_contenders(SHAPE, torch.float32)
    with torch.no_grad():
        contenders[name].parameters[2][3] *= 1.01
    with pytest.raises(UserError, match=rf"^{name} is off the float64 reference by"):
        check_agreement(contenders, SHAPE.top_k)


def test_a_contender_that_gives_nan_is_named():
    contenders = build_contenders(SHAPE, torch.float32)
    with torch.no_grad():
        contenders["torch"].parameters[1][0] = torch.nan
    with pytest.raises(UserError, match=r"^torch is off the float64 reference by"):
        check_agreement(contenders, SHAPE.top_k)


def test_without_transformers_the_others_remain(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert list(build_contenders(SHAPE, torch.float32)) == ["fomoe", "torch"]


@pytest.mark.parametrize(
    ("name", "calls"), [("torch", 2), ("hf_grouped_mm", 2), ("hf_eager", 0), ("fomoe", 0)]
)
def test_a_contender_computes_the_way_its_name_says(name: str, calls: int):
    contender = build_contenders(SHAPE, torch.float32)[name]
    with torch.no_grad(), torch.profiler.profile() as profile:
        contender.forward(torch.randn(SHAPE.tokens, SHAPE.dim))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("aten::_grouped_mm", 0) == calls


def test_a_forward_keeps_no_graph_and_a_training_step_begins_without_gradients():
    batch = Batch(*torch.randn(2, SHAPE.tokens, SHAPE.dim).unbind())
    for contender in build_contenders(SHAPE, torch.float32).values():
        output = _prepare_forward(contender)(batch)()
        assert isinstance(output, torch.Tensor)
        assert not output.requires_grad
        for _ in range(2):
            call = _prepare_training(contender)(batch)
            assert all(parameter.grad is None for parameter in contender.parameters)
            call()
            assert all(parameter.grad is not None for parameter in contender.parameters)


def test_what_a_forward_keeps_is_what_is_allocated_after_it():
    forwards: list[bool] = []

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            forwards.append(torch.is_grad_enabled())
            return x * 2

    contender = Contender(Layer(), ())
    kept = activation_bytes(contender, torch.ones(2, 3), lambda: 1000 + 24 * forwards.count(True))
    assert kept == 24
    assert forwards == [False, True]  # the first is not counted
