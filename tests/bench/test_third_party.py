# SPDX-License-Identifier: Apache-2.0
"""Layers of other libraries: found, filled with our weights, or named with the reason."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe.bench.agreement import check_agreement
from fomoe.bench.baselines import OURS, build_contenders
from fomoe.bench.shapes import Shape
from fomoe.bench.third_party import THIRD_PARTY, build_third_party

SHAPE = Shape(tokens=8, dim=24, expert_dim=16, num_experts=8, top_k=2)


@pytest.fixture(autouse=True)
def _none_is_installed(monkeypatch: pytest.MonkeyPatch):
    for name in ("scattermoe", "sonicmoe", "liger_kernel"):
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    for module in {name.partition(".")[0], name}:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


class Weight(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*sizes))


class GLUMLP(nn.Module):
    """What scattermoe's computes: the first half of the rows of w1 is up, the second gate."""

    def __init__(self, dim: int, expert_dim: int, experts: int, top_k: int, activation: Any):
        super().__init__()
        self.experts = Weight(experts, 2 * expert_dim, dim)
        self.output_experts = Weight(experts, dim, expert_dim)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        pre = torch.einsum("td,efd->tef", x, self.experts.weight)
        up, gate = pre.chunk(2, dim=-1)
        out = torch.einsum("tef,edf->ted", F.silu(gate) * up, self.output_experts.weight)
        chosen = out.gather(1, ids[..., None].expand(-1, -1, x.shape[1]))
        return (chosen * weights[..., None]).sum(1)


def test_what_is_not_installed_is_named():
    ours = build_contenders(SHAPE, torch.float32)[OURS]
    contenders, missing = build_third_party(SHAPE, ours.parameters)
    assert contenders == {}
    assert missing == dict.fromkeys(THIRD_PARTY, "not installed")


def test_a_layer_that_keeps_its_rows_in_another_order_gets_our_weights(
    monkeypatch: pytest.MonkeyPatch,
):
    install(monkeypatch, "scattermoe.mlp", GLUMLP=GLUMLP)
    ours = build_contenders(SHAPE, torch.float32)[OURS]
    contenders, missing = build_third_party(SHAPE, ours.parameters)
    assert list(contenders) == ["scattermoe"]
    assert list(missing) == ["sonicmoe", "liger"]
    agreement = check_agreement({OURS: ours, **contenders}, SHAPE.top_k)["scattermoe"]
    assert max(agreement.output, agreement.gradient) < 5e-6


def test_a_library_that_refuses_the_shape_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("only multiples of 64\nand more")

    install(monkeypatch, "scattermoe.mlp", GLUMLP=refuse)
    ours = build_contenders(SHAPE, torch.float32)[OURS]
    contenders, missing = build_third_party(SHAPE, ours.parameters)
    assert contenders == {}
    assert missing["scattermoe"] == "only multiples of 64"
