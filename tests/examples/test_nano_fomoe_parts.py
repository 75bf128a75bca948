# SPDX-License-Identifier: Apache-2.0
"""The parts of the executable paper, each against values worked by hand."""

import hashlib
import importlib.util
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PATH = Path(__file__).resolve().parents[2] / "examples" / "nano_fomoe.py"
spec = importlib.util.spec_from_file_location("nano_fomoe_parts", PATH)
nano = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = nano
spec.loader.exec_module(nano)

TINY = nano.Config(dim=32, num_heads=2, num_experts=4, expert_dim=24, top_k=2)


# --- placement, names, initial values -------------------------------------------------------------


def test_placement_by_hand():
    # Expert e of layer i is on the 2 sites that start at 2 e + i, modulo 4.
    config = replace(TINY, sites=4, overlap=2, num_experts=4, num_layers=2)
    assert [nano.residents(config, site) for site in range(4)] == [
        ((0, 2), (1, 3)),
        ((0, 2), (0, 2)),
        ((1, 3), (0, 2)),
        ((1, 3), (1, 3)),
    ]


@pytest.mark.parametrize(
    ("sites", "overlap", "experts"),
    [(1, 1, 4), (3, 1, 6), (3, 2, 6), (4, 2, 16), (4, 3, 8), (5, 5, 3), (8, 3, 16)],
)
def test_placement_puts_an_expert_on_overlap_sites_and_fills_sites_evenly(sites, overlap, experts):
    config = replace(TINY, sites=sites, overlap=overlap, num_experts=experts, num_layers=3)
    placement = [nano.residents(config, site) for site in range(sites)]
    for layer in range(3):
        here = [resident[layer] for resident in placement]
        assert {len(ids) for ids in here} == {experts * overlap // sites}
        assert Counter(e for ids in here for e in ids) == dict.fromkeys(range(experts), overlap)


@pytest.mark.parametrize(("overlap", "experts"), [(0, 4), (5, 4), (1, 6)])
def test_impossible_placement_is_refused(overlap, experts):
    config = replace(TINY, overlap=overlap, num_experts=experts)
    with pytest.raises(ValueError, match=f"overlap {overlap}"):
        nano.train(config, None)


def test_parameters_have_the_names_and_the_order_of_the_decoder():
    block = [
        "attention_norm.weight",
        "attention.query.weight",
        "attention.key.weight",
        "attention.value.weight",
        "attention.output.weight",
        "attention_output_norm.weight",
        "moe_norm.weight",
        "moe.router.weight",
        "moe.experts.w1",
        "moe.experts.w2",
        "moe_output_norm.weight",
    ]
    expected = [
        "embedding.weight",
        "embedding_norm.weight",
        *(f"layers.{layer}.{name}" for layer in range(2) for name in block),
        "norm.weight",
    ]
    model = nano.Model(TINY, ((0, 2), (1, 3)))
    assert [name for name, _ in model.named_parameters()] == expected
    assert model.layers[1].moe.experts.w1.shape == (2, 24, 32)
    assert "layers.1.moe.experts.3.w2" in dict(nano.tensors(model))


@pytest.mark.parametrize("router", ["full", "partitioned"])
def test_initial_values_depend_on_the_name_only(router):
    config = replace(TINY, router=router)
    whole, part = nano.Model(config), nano.Model(config, ((0, 2), (1, 3)))
    nano.initialize(whole, 7)
    nano.initialize(part, 7)
    everything = dict(nano.tensors(whole))
    for name, tensor in nano.tensors(part):
        assert torch.equal(tensor, everything[name]), name
    assert torch.equal(everything["norm.weight"], torch.ones(32))
    name = "layers.0.moe.experts.1.w2"
    seed = int.from_bytes(hashlib.sha256(f"7:{name}".encode()).digest()[:8], "little") >> 1
    drawn = torch.randn(32, 24, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(everything[name], drawn * (1 / math.sqrt(24)))


# --- the layer ------------------------------------------------------------------------------------


def test_attention_by_hand():
    # One head of width 4: as complex numbers, (x0 + i x2, x1 + i x3) turn by 1 and 0.01 a position.
    x = torch.tensor([[0.3, -0.5, 0.2, 0.7], [0.1, 0.4, -0.6, 0.9]], dtype=torch.float64)
    turned = torch.complex(x[:, :2], x[:, 2:])
    turned[1] *= torch.polar(torch.ones(2), torch.tensor([1.0, 0.01])).to(torch.complex128)
    scores = (turned[1] * turned.conj()).real.sum(dim=1) / 2  # of position 1, over sqrt(4)
    expected = torch.stack([x[0], scores.softmax(dim=0) @ x])
    y = nano.attention(x[None], 1, *[torch.nn.Identity()] * 4)
    torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=1e-6)


def test_a_later_token_changes_no_earlier_prediction():
    model = nano.initialize(nano.Model(TINY), 0)
    tokens = torch.arange(12)[None]
    before = model(tokens)
    tokens[0, 7] = 200
    after = model(tokens)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7], before[:, 7])


def test_ghost_experts_contribute_nothing():
    config = replace(TINY, num_layers=1)
    whole, part = nano.Model(config), nano.Model(config, ((0, 2),))
    for model in (whole, part):
        nano.initialize(model, 0)
    for name, tensor in nano.tensors(whole):
        if ".experts.1." in name or ".experts.3." in name:
            tensor.zero_()
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(part(tokens), whole(tokens))
    assert whole.layers[0].moe.ghost_share == 0
    assert 0.2 < part.layers[0].moe.ghost_share < 0.8


def test_partitioned_router_scores_residents_only():
    model = nano.initialize(
        nano.Model(replace(TINY, router="partitioned", top_k=3), ((1,),) * 2), 0
    )
    moe = model.layers[0].moe
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    y = moe(x)
    assert moe.router.weight.shape == (1, 32)
    assert moe.ghost_share == 0
    gate = (x @ moe.router.weight.T).sigmoid()
    torch.testing.assert_close(y, gate * (F.silu(x @ moe.experts.w1[0].T) @ moe.experts.w2[0].T))


def test_auxiliary_loss_by_hand():
    config = replace(TINY, num_experts=2, top_k=1, dim=2, num_heads=1)
    moe = nano.MoE(config, (0, 1))
    for parameter in moe.parameters():
        torch.nn.init.zeros_(parameter)
    moe.router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    moe(torch.tensor([[[2.0, 0.0], [3.0, 0.0]]]))  # both tokens choose expert 0
    first, second = (torch.tensor(x).sigmoid().item() for x in (2.0, 3.0))
    probability = (first / (first + 0.5) + second / (second + 0.5)) / 2
    z = (math.log(math.exp(2) + 1) ** 2 + math.log(math.exp(3) + 1) ** 2) / 2
    assert moe.auxiliary_loss.item() == pytest.approx(1e-2 * 2 * probability + 1e-3 * z)


def test_ties_go_to_the_lowest_expert():
    moe = nano.MoE(TINY, (0, 1, 2, 3))
    for parameter in moe.parameters():
        torch.nn.init.zeros_(parameter)
    moe.experts.w1.data[:2], moe.experts.w2.data[:2] = 1.0, 1.0
    x = torch.ones(1, 2, 32)
    expected = 2 * 0.5 * 24 * F.silu(torch.tensor(32.0))
    torch.testing.assert_close(moe(x), expected.expand(1, 2, 32))


# --- the exchange ---------------------------------------------------------------------------------


def test_mean_by_hand():
    views = [{"shared": torch.tensor([1.0]), "expert": torch.tensor([5.0])},
             {"shared": torch.tensor([4.0])}]  # fmt: skip
    means = nano.exchange(views, [10.0, 20.0])
    assert means == {"shared": torch.tensor([3.0]), "expert": torch.tensor([5.0])}
    assert views == [means, {"shared": torch.tensor([3.0])}]


def test_mean_is_summed_in_ascending_site_order():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 1000, generator=generator)
    expected = (a * 7.0 + b * 11.0 + c * 13.0) / 31.0
    means = nano.exchange([{"x": v.clone()} for v in (a, b, c)], [7.0, 11.0, 13.0])
    backwards = nano.exchange([{"x": v.clone()} for v in (c, b, a)], [13.0, 11.0, 7.0])
    assert torch.equal(means["x"], expected)
    assert not torch.equal(means["x"], backwards["x"])


def test_single_holder_is_copied_to_the_bit():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nano.exchange([{"x": x.clone()}, {}], [7.0, 7.0])["x"], x)
    assert not torch.equal(x * 7.0 / 7.0, x)
