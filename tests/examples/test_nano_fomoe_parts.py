# SPDX-License-Identifier: Apache-2.0
"""The parts of the executable paper, each against values worked by hand."""

import hashlib
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nano_example import nano

TINY = nano.Config(dim=32, num_heads=2, num_experts=4, expert_dim=24, top_k=2)


# --- placement, names, initial values -------------------------------------------------------------


def test_fixed_placement_by_hand():
    # Expert e of layer i is on the 2 sites that start at 2 e + i, modulo 4.
    config = replace(TINY, sites=4, overlap=2, num_experts=4, num_layers=2)
    assert nano.placement(config) == {
        (0, 0): (0, 1), (0, 1): (2, 3), (0, 2): (0, 1), (0, 3): (2, 3),
        (1, 0): (1, 2), (1, 1): (0, 3), (1, 2): (1, 2), (1, 3): (0, 3),
    }  # fmt: skip


def test_random_placement_follows_its_rule():
    """Experts in random order go to those that hold fewest, at random among equals."""
    config = replace(TINY, sites=4, overlap=2, num_experts=6, num_layers=1, placement="random",
                     seed=5)  # fmt: skip
    rng = random.Random("5:placement:3:0")
    shuffled = lambda n: sorted(range(n), key=lambda _: rng.random())  # noqa: E731
    load, expected = [0] * 4, {}
    for expert in shuffled(6):
        order = sorted(shuffled(4), key=load.__getitem__)  # stable
        expected[0, expert] = tuple(sorted(order[:2]))
        for site in order[:2]:
            load[site] += 1
    assert nano.placement(config, 3) == expected
    assert nano.placement(config, 3) != nano.placement(config, 4)
    assert nano.placement(config, 3) != nano.placement(replace(config, seed=6), 3)


@pytest.mark.parametrize("kind", ["fixed", "random"])
@pytest.mark.parametrize(
    ("sites", "overlap", "experts"),
    [(1, 1, 4), (3, 1, 6), (3, 2, 6), (4, 2, 16), (4, 3, 8), (5, 5, 3), (8, 3, 16)],
)
def test_placement_fills_sites_evenly(sites, overlap, experts, kind):
    config = replace(TINY, sites=sites, overlap=overlap, num_experts=experts, num_layers=3,
                     placement=kind)  # fmt: skip
    for t in range(5):
        placement = nano.placement(config, t)
        assert list(placement) == [(layer, e) for layer in range(3) for e in range(experts)]
        for layer in range(3):
            holders = [placement[layer, e] for e in range(experts)]
            assert all(list(sites) == sorted(set(sites)) for sites in holders)
            assert {len(sites) for sites in holders} == {overlap}
            load = Counter(site for sites in holders for site in sites)
            assert load == dict.fromkeys(range(sites), experts * overlap // sites)


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


# --- codecs ---------------------------------------------------------------------------------------


def test_int4_by_hand():
    x = torch.zeros(300)
    x[:4] = torch.tensor([-14.0, 3.0, 5.0, 0.9])  # scale 2: -7, 1.5, 2.5, 0.45
    x[128:130] = torch.tensor([0.7, -0.06])  # scale 0.1: 7, -0.6
    expected = torch.zeros(300)
    expected[:4] = torch.tensor([-14.0, 4.0, 4.0, 0.0])  # half to even
    scale = torch.tensor(0.7) / 7
    expected[128:130] = torch.stack([7 * scale, -scale])
    y, size = nano.encode_decode(x.view(30, 10), "int4")
    assert torch.equal(y, expected.view(30, 10))
    assert size == 3 * (4 + 64)


def test_int8_by_hand():
    x = torch.tensor([254.0, -3.0, 1.2])  # scale 2: 127, -1.5, 0.6
    y, size = nano.encode_decode(x, "int8")
    assert torch.equal(y, torch.tensor([254.0, -4.0, 2.0]))
    assert size == 4 + 128


def test_bf16_rounds_to_even():
    x = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1.25])
    y, size = nano.encode_decode(x, "bf16")
    assert torch.equal(y, torch.tensor([1.0, 1 + 4 * 2.0**-8, -1.25]))
    assert size == 6


def test_fp32_is_the_thing_itself():
    x = torch.randn(5)
    y, size = nano.encode_decode(x, "fp32")
    assert torch.equal(x, y)
    assert size == 20
    assert nano.encode_decode(x.double(), "fp32")[1] == 40


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_nothing_and_next_to_nothing_become_zero(codec):
    x = torch.zeros(256)
    x[130] = 1e-45  # its scale is zero
    assert torch.equal(nano.encode_decode(x, codec)[0], torch.zeros(256))


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_what_was_sent_and_what_is_still_lost_are_what_was_meant(codec):
    """Up from two sites and down from the owner, over many rounds."""
    generator = torch.Generator().manual_seed(0)
    lost, start, meant = defaultdict(float), {"x": torch.zeros(2, 200)}, torch.zeros(2, 200)
    for _ in range(20):
        deltas = torch.randn(2, 2, 200, generator=generator)
        views = [{"x": start["x"] - delta} for delta in deltas]
        meet(views, [1.0, 3.0], start, lost=lost, outer="average", codec=codec)
        meant = meant - (deltas[0] + 3 * deltas[1]) / 4
    up, down = (lost[0, "x"] + 3 * lost[1, "x"]) / 4, lost["x"]
    assert min(up.abs().max(), down.abs().max()) > 1e-3
    torch.testing.assert_close(start["x"] - up - down, meant, rtol=0, atol=2e-5)


# --- the exchange ---------------------------------------------------------------------------------

ROW = "layers.0.moe.router.1.weight"
EXPERT = "layers.0.moe.experts.1.w1"


def meet(views, tokens, start=None, lost=None, holders=None, momenta=None, **settings):
    """The exchange of these views, which take the result, as start does. -> sites that failed"""
    config = replace(TINY, sites=len(views), **{"outer": "average", **settings})
    failed, names = set(), {name for view in views for name in view}
    everyone = {n: tuple(s for s, view in enumerate(views) if n in view) for n in names}
    nano.exchange(
        config, views, tokens, failed, start or {}, everyone | (holders or {}),
        {} if momenta is None else momenta, defaultdict(float) if lost is None else lost,
    )  # fmt: skip
    if start:
        start |= {name: view[name].clone() for view in views for name in view}
    return failed


def test_mean_by_hand():
    views = [{"shared": torch.tensor([1.0]), "expert": torch.tensor([5.0])},
             {"shared": torch.tensor([4.0])}]  # fmt: skip
    assert meet(views, [10.0, 20.0]) == set()
    assert views == [{"shared": torch.tensor([3.0]), "expert": torch.tensor([5.0])},
                     {"shared": torch.tensor([3.0])}]  # fmt: skip


def test_mean_is_summed_in_ascending_site_order():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 1000, generator=generator)
    expected = (a * 7.0 + b * 11.0 + c * 13.0) / 31.0
    forwards, backwards = ([{"x": v.clone()} for v in order] for order in ((a, b, c), (c, b, a)))
    meet(forwards, [7.0, 11.0, 13.0])
    meet(backwards, [13.0, 11.0, 7.0])
    assert torch.equal(forwards[0]["x"], expected)
    assert not torch.equal(forwards[0]["x"], backwards[0]["x"])


def test_single_holder_is_copied_to_the_bit():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    views = [{"x": x.clone()}, {}]
    meet(views, [7.0, 7.0])
    assert torch.equal(views[0]["x"], x)
    assert not torch.equal(x * 7.0 / 7.0, x)


def rows(*values, name=ROW):
    return [{name: torch.tensor([value])} for value in values]


def test_rows_of_a_full_router_by_hand():
    holders = {ROW: (1, 2)}
    views = rows(1.0, 2.0, 6.0)
    meet(views, [4.0, 1.0, 3.0], holders=holders)
    assert views == rows(3.0, 3.0, 3.0)  # (4 * 1 + 2 + 3 * 6) / 8
    views = rows(1.0, 2.0, 6.0)
    meet(views, [4.0, 1.0, 3.0], holders=holders, router_mean="holders")
    assert views == rows(5.0, 5.0, 5.0)  # (2 + 3 * 6) / 4; site 0 only receives


def test_factors_of_displacements_by_hand():
    nesterov = {"outer": "nesterov", "outer_lr": 1.0, "outer_momentum": 0.0}
    start = {ROW: torch.tensor([10.0]), EXPERT: torch.tensor([10.0]), "norm": torch.tensor([10.0])}
    views = [{name: torch.tensor([4.0]) for name in start} for _ in range(4)]
    for view in views[1:]:
        del view[EXPERT]
    factors = {"router_mean": "rescaled", "scale_expert_steps": True}
    meet(views, [1.0] * 4, start, holders={ROW: (0,), EXPERT: (0,)}, **factors, **nesterov)
    # All moved by 6: a row of the router times 4 sites / 1 holder, an expert times sqrt(1 / 4).
    assert views[0] == {ROW: torch.tensor([-14.0]), EXPERT: torch.tensor([7.0]),
                        "norm": torch.tensor([4.0])}  # fmt: skip


def test_nesterov_by_hand():
    start, momenta = {"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0])}
    views = [{"x": torch.tensor([0.5])}]
    meet(views, [1.0], start, momenta=momenta, outer="nesterov", outer_lr=0.5, outer_momentum=0.5)
    assert momenta == {"x": torch.tensor([1.5])}  # 2 * 0.5 + 0.5
    assert views == [{"x": torch.tensor([1.0 - (0.5 + 1.5 * 0.5) * 0.5])}]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
def test_a_site_with_something_not_finite_only_receives(codec):
    start, lost = {"x": torch.tensor([0.0]), "y": torch.tensor([8.0])}, defaultdict(float)
    views = [{"x": torch.tensor([1.0])}, {"x": torch.tensor([5.0]), "y": torch.tensor([math.inf])}]
    assert meet(views, [1.0, 1.0], start, lost=lost, codec=codec) == {1}
    one = torch.tensor([1.0])
    assert views == [{"x": one}, {"x": one, "y": torch.tensor([8.0])}]
    assert lost[1, "x"] == lost[1, "y"] == 0.0
