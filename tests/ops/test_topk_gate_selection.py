# SPDX-License-Identifier: Apache-2.0
"""Which experts topk_gate chooses: bias, groups, residents, ties, NaN and the bits of scores."""

import math

import pytest
import torch
from gate_cases import (
    OPTIONS,
    SCORES,
    SETTINGS,
    assert_equals_the_reference,
    result_and_gradient,
    tensors_for,
)
from samples import SAMPLE, SAMPLES, assert_close, gradient_like, leaf, name_of

from fomoe import ops, reference
from fomoe.reference._score import sigmoid_bits


def test_a_bias_moves_the_choice_but_not_the_weights():
    # sigmoid of (0, log 3, -log 3) is (1/2, 3/4, 1/4); plus the bias 0.5, 0.75, 0.85.
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    gate = ops.topk_gate(logits.requires_grad_(), 2, score="sigmoid", bias=bias)
    assert gate.ids.tolist() == [[2, 1]]
    assert gate.weights.tolist() == [[pytest.approx(1 / 4), pytest.approx(3 / 4)]]
    gate.weights.sum().backward()
    assert bias.grad is None
    # On logits the same bias changes nothing: 0, 1.1, -0.5.
    assert ops.topk_gate(logits, 2, bias=bias).ids.tolist() == [[1, 0]]


def test_groups_are_ranked_by_their_best_score_or_the_sum_of_two():
    # Three groups of two: best 9, 8, 7; sums 9, 14, 13.
    logits = torch.tensor([[9.0, 0.0, 8.0, 6.0, 7.0, 6.0]])
    groups = {"num_groups": 3, "top_k_groups": 2}
    assert ops.topk_gate(logits, 3, **groups).ids.tolist() == [[0, 2, 3]]
    by_sum = ops.topk_gate(logits, 3, group_score="top2_sum", **groups)
    assert by_sum.ids.tolist() == [[2, 4, 3]]
    assert by_sum.weights.sum() < 0.5  # of the softmax over all, group 0 included


def test_experts_that_are_not_resident_act_as_if_they_were_not_there():
    # Of exp(logits) = 1, NaN, 5, 3 experts 0 and 3 are resident.
    logits = torch.tensor([[0.0, math.nan, math.log(5), math.log(3)]], dtype=torch.float64)
    resident = torch.tensor([True, False, False, True])
    logits.requires_grad_()
    gate = ops.topk_gate(logits, 3, resident=resident)
    assert gate.ids.tolist() == [[3, 0, -1]]
    assert gate.weights.tolist() == [[pytest.approx(3 / 4), pytest.approx(1 / 4), 0.0]]
    assert gate.counts.tolist() == [1, 0, 0, 1]
    assert gate.prob_sum.tolist() == [pytest.approx(1 / 4), 0.0, 0.0, pytest.approx(3 / 4)]
    assert gate.z_sum.item() == pytest.approx(math.log(4) ** 2)
    (gate.weights[0, 0] + gate.z_sum).backward()
    assert logits.grad[0, 1:3].tolist() == [0.0, 0.0]
    assert logits.grad[0, [0, 3]].isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_without_residents_nothing_is_chosen_and_nothing_learned(score):
    logits = leaf(torch.full((3, 5), math.nan))
    gate = ops.topk_gate(logits, 2, score=score, resident=torch.zeros(5, dtype=torch.bool))
    assert gate.ids.tolist() == [[-1, -1]] * 3
    assert gate.weights.tolist() == [[0.0, 0.0]] * 3
    assert (gate.counts.sum(), gate.prob_sum.sum(), gate.z_sum) == (0, 0, 0)
    (gate.weights.sum() + gate.prob_sum.sum() + gate.z_sum).backward()
    assert logits.grad.tolist() == [[0.0] * 5] * 3


def test_a_mask_of_all_experts_changes_no_bit():
    logits = SAMPLE.logits(torch.float32)
    everyone = torch.ones(7, dtype=torch.bool)
    for settings in SETTINGS:
        results = [
            result_and_gradient(ops.topk_gate, logits, 3, settings | {"resident": resident})
            for resident in (None, everyone)
        ]
        (plain, d_plain), (masked, d_masked) = results
        assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True))
        assert torch.equal(d_plain, d_masked)


def test_a_mask_equals_the_gate_over_the_residents_alone():
    """Router mode A of FoMoE (arXiv 2606.19025)."""
    logits, experts = SAMPLE.logits(torch.float32), torch.tensor([0, 4, 5])
    resident = torch.zeros(7, dtype=torch.bool).index_fill(0, experts, True)
    for settings in SETTINGS:
        all_logits, few_logits = leaf(logits), leaf(logits[:, experts])
        masked = ops.topk_gate(all_logits, 3, resident=resident, **settings)
        alone = ops.topk_gate(few_logits, 3, **settings)
        assert torch.equal(masked.ids.long(), experts[alone.ids.long()])
        assert torch.equal(masked.weights, alone.weights)
        assert torch.equal(masked.prob_sum[experts], alone.prob_sum)
        assert torch.equal(masked.z_sum, alone.z_sum)
        gradient = gradient_like(alone.weights)
        for gate in (masked, alone):
            loss = (gate.weights * gradient).sum() + gate.prob_sum.square().sum() + gate.z_sum
            loss.backward()
        assert torch.equal(all_logits.grad[:, experts], few_logits.grad)
        assert all_logits.grad[:, ~resident].eq(0).all()


def deepseek_v3_gate(logits, bias):
    """Gate of DeepSeek-V3 by dense masks: 8 groups of 32 of which 4, top 8, scale 2.5."""
    tokens = logits.shape[0]
    scores = torch.sigmoid(logits)
    biased = (scores + bias).view(tokens, 8, 32)
    group_scores = biased.topk(2, dim=-1).values.sum(dim=-1)
    groups = group_scores.topk(4, dim=-1).indices
    mask = torch.zeros(tokens, 8).scatter(1, groups, 1).bool().unsqueeze(-1)
    allowed = biased.masked_fill(~mask, -math.inf).view(tokens, 256)
    ids = allowed.topk(8, dim=-1).indices
    dense = torch.zeros_like(scores).scatter(1, ids, scores.gather(1, ids))
    return ids, 2.5 * dense / dense.sum(dim=-1, keepdim=True)


def test_the_gate_of_deepseek_v3_equals_its_dense_formulation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 256, generator=generator, dtype=torch.float64)
    bias = 0.1 * torch.randn(256, generator=generator, dtype=torch.float64)
    ours, theirs = leaf(logits), leaf(logits)
    gate = ops.topk_gate(
        ours,
        8,
        score="sigmoid",
        bias=bias,
        num_groups=8,
        top_k_groups=4,
        group_score="top2_sum",
        renormalize=True,
        scale=2.5,
    )
    weights = torch.zeros_like(logits).scatter(1, gate.ids.long(), gate.weights)
    ids, expected = deepseek_v3_gate(theirs, bias)
    assert torch.equal(gate.ids.long(), ids)
    assert_close(weights, expected, torch.float64)
    gradient = gradient_like(expected)
    weights.backward(gradient)
    expected.backward(gradient)
    assert_close(ours.grad, theirs.grad, torch.float64)


def test_ties_go_to_the_lowest_index_and_nan_ranks_last():
    logits = torch.tensor([[-0.0, 0.0, math.nan, -math.inf, math.nan, math.inf]])
    assert ops.topk_gate(logits, 6).ids.tolist() == [[5, 0, 1, 3, 2, 4]]
    assert ops.topk_gate(torch.zeros(1, 4096), 40).ids.tolist() == [list(range(40))]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("score", SCORES)
def test_ids_with_ties_nan_and_infinity_equal_the_reference(score, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (200, 60), generator=generator).float()
    special = torch.randint(0, 12, logits.shape, generator=generator)
    for code, value in enumerate([math.nan, math.inf, -math.inf]):
        logits[special == code] = value
    settings = tensors_for(options, 60, torch.float32)
    if "bias" in settings:
        settings["bias"] = settings["bias"].round()
        settings["bias"][[3, 14, 30]] = torch.tensor([math.nan, math.inf, -math.inf])
    for top_k in (3, 24, 40):
        if top_k > 24 and options.get("num_groups", 1) > 1:
            continue
        for after in (False, True):
            arguments = {"score": score, "score_after_top_k": after} | settings
            actual = ops.topk_gate(logits, top_k, **arguments)
            expected = reference.topk_gate(logits, top_k, **arguments)
            assert torch.equal(actual.ids, expected.ids)
            torch.testing.assert_close(actual.weights, expected.weights, equal_nan=True)
            torch.testing.assert_close(actual.prob_sum, expected.prob_sum, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("score", SCORES)
def test_a_score_larger_by_one_unit_in_the_last_place_wins(score, dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(100, 1, generator=generator, dtype=torch.float64).to(dtype)
    winners = torch.randint(64, (100, 1), generator=generator)
    above = torch.nextafter(base, torch.full_like(base, math.inf))
    logits = base.repeat(1, 64).scatter(1, winners, above)
    ids = ops.topk_gate(logits, 2, score=score).ids.long()
    assert torch.equal(ids[:, :1], winners)
    assert torch.equal(ids[:, 1:], (winners == 0).long())  # all others tie


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("winner", [0, 1, 62, 63])
def test_a_bias_that_lifts_a_sigmoid_by_one_unit_in_the_last_place_wins(winner, dtype):
    # sigmoid(0) + 1/4 = 3/4, whose neighbour is eps / 2 above.
    logits, bias = torch.zeros(1, 64, dtype=dtype), torch.full((64,), 0.25, dtype=dtype)
    bias[winner] += torch.finfo(dtype).eps / 2
    ids = ops.topk_gate(logits, 2, score="sigmoid", bias=bias).ids
    assert ids.tolist() == [[winner, 1 if winner == 0 else 0]]
    # Half of that is lost in the sum.
    bias[winner] -= torch.finfo(dtype).eps / 4
    assert ops.topk_gate(logits, 2, score="sigmoid", bias=bias).ids.tolist() == [[0, 1]]


def test_the_sigmoid_has_the_bits_of_the_specification():
    for dtype in (torch.float32, torch.float64):
        logits = (SAMPLES[-1].logits(torch.float64) * 40).to(dtype)
        gate = ops.topk_gate(logits, 40, score="sigmoid")
        assert torch.equal(gate.weights, sigmoid_bits(logits).gather(1, gate.ids.long()))
        torch.testing.assert_close(sigmoid_bits(logits), torch.sigmoid(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_ids_follow_the_bits_of_the_sigmoid_where_neighbours_collide(dtype):
    # 512 logits so close together that many sigmoids are equal or one unit apart.
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(64, (40, 512), generator=generator).to(dtype)
    center = torch.linspace(-9, 9, 40, dtype=dtype).unsqueeze(1)
    logits = center * (1 + steps * torch.finfo(dtype).eps)
    for settings in (
        {"bias": torch.zeros(512, dtype=dtype)},
        {"bias": torch.full((512,), 0.1, dtype=dtype)},
        {"num_groups": 64, "top_k_groups": 9, "group_score": "top2_sum"},
    ):
        actual = ops.topk_gate(logits, 40, score="sigmoid", **settings)
        expected = reference.topk_gate(logits, 40, score="sigmoid", **settings)
        assert torch.equal(actual.ids, expected.ids)
    # The test can fail: by the logits themselves the order is another.
    assert not torch.equal(
        ops.topk_gate(logits, 40).ids,
        ops.topk_gate(logits, 40, score="sigmoid", bias=torch.zeros(512, dtype=dtype)).ids,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_saturated_sigmoids_tie_to_the_lowest_index(dtype):
    high = torch.linspace(900, 50, 100, dtype=dtype).flip(0)  # ascending: the last is the largest
    for logits, value in ((high, 1.0), (-900 - high, 0.0)):
        row = logits.unsqueeze(0)
        # Without a bias the logit decides, which does not saturate.
        assert ops.topk_gate(row, 3, score="sigmoid").ids[0, 0] == int(logits.argmax())
        bias = torch.zeros(100, dtype=dtype)
        gate = ops.topk_gate(row, 3, score="sigmoid", bias=bias)
        assert gate.ids.tolist() == [[0, 1, 2]]
        assert gate.weights.tolist() == [[value] * 3]
        bias[70] = 1e-3
        gate = ops.topk_gate(row, 3, score="sigmoid", bias=bias)
        assert gate.ids.tolist() == [[70, 0, 1]]
        # Groups of ten: all sums are equal.
        groups = {"num_groups": 10, "top_k_groups": 2, "group_score": "top2_sum"}
        gate = ops.topk_gate(row, 20, score="sigmoid", **groups)
        assert gate.ids.tolist() == [list(range(20))]


@pytest.mark.parametrize("score", SCORES)
def test_all_of_4096_experts_can_be_chosen(score):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4096, generator=generator, dtype=torch.float64)
    assert_equals_the_reference(logits, 4096, {"score": score, "renormalize": True})
    assert ops.topk_gate(logits, 4096, score=score).ids.sort().values[0].tolist() == list(
        range(4096)
    )


@pytest.mark.parametrize("score", SCORES)
def test_the_only_expert_is_always_chosen(score):
    gate = ops.topk_gate(torch.zeros(3, 1), 1, score=score, bias=torch.ones(1), renormalize=True)
    assert gate.ids.tolist() == [[0]] * 3
    assert gate.weights.tolist() == [[1.0]] * 3
    assert gate.prob_sum.tolist() == [3.0]


def test_a_slot_without_an_expert_weighs_nothing_next_to_nan():
    # One eligible expert of three, with a NaN logit: its own weight is NaN, the missing ones are 0.
    logits, resident = torch.tensor([[math.nan, 1.0, 2.0]]), torch.tensor([True, False, False])
    for topk_gate in (ops.topk_gate, reference.topk_gate):
        for score in ("softmax", "sigmoid"):
            gate = topk_gate(logits, 3, score=score, resident=resident, renormalize=True)
            assert gate.ids.tolist() == [[0, -1, -1]]
            assert gate.weights[0, 0].isnan()
            assert gate.weights[0, 1:].tolist() == [0, 0]
