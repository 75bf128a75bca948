# SPDX-License-Identifier: Apache-2.0
"""The gate's specification against hand-worked numbers and a loop over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.reference import topk_gate
from fomoe.reference._score import sigmoid_bits

NAN, INF = math.nan, math.inf


def test_softmax_weights_of_a_hand_worked_token():
    # exp(logits) = 1, 2, 5: probabilities 1/8, 2/8, 5/8.
    gate = topk_gate(torch.tensor([[0.0, math.log(2), math.log(5)]]), 2)

    assert gate.ids.tolist() == [[2, 1]]
    assert gate.weights.tolist() == [pytest.approx([5 / 8, 2 / 8])]
    assert gate.counts.tolist() == [0, 1, 1]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert gate.z_sum.item() == pytest.approx(math.log(8) ** 2)


def test_sigmoid_weights_are_not_normalised_over_experts_but_prob_sum_is():
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-log 3) = 1/4; together 3/2.
    gate = topk_gate(torch.tensor([[0.0, math.log(3), -math.log(3)]]), 2, score="sigmoid")

    assert gate.ids.tolist() == [[1, 0]]
    assert gate.weights.tolist() == [pytest.approx([3 / 4, 1 / 2])]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6])


def test_weights_are_renormalised_over_the_chosen_before_scaling():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    gate = topk_gate(logits, 2, renormalize=True, scale=2.5)
    assert gate.weights.tolist() == [pytest.approx([2.5 * 5 / 7, 2.5 * 2 / 7])]


def test_unit_weights_are_one_or_the_share_of_the_choices():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    gate = topk_gate(logits, 2, score="unit", scale=3.0)
    assert gate.weights.tolist() == [[3.0, 3.0]]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert topk_gate(logits, 2, score="unit", renormalize=True).weights.tolist() == [[0.5, 0.5]]


def test_the_softmax_after_top_k_is_over_the_chosen_logits():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    gate = topk_gate(logits, 2, score_after_top_k=True)
    assert gate.weights.tolist() == [pytest.approx([5 / 7, 2 / 7])]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_a_bias_moves_the_choice_but_not_the_weights():
    # sigmoid of (0, log 3, -log 3) is (1/2, 3/4, 1/4); plus the bias 0.5, 0.75, 0.85.
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    gate = topk_gate(logits, 2, score="sigmoid", bias=torch.tensor([0.0, 0.0, 0.6]))
    assert gate.ids.tolist() == [[2, 1]]
    assert gate.weights.tolist() == [pytest.approx([1 / 4, 3 / 4])]


def test_groups_are_ranked_by_their_best_score_or_the_sum_of_two():
    # Three groups of two: best 9, 8, 7; sums 9, 14, 13.
    logits = torch.tensor([[9.0, 0.0, 8.0, 6.0, 7.0, 6.0]])
    groups = {"num_groups": 3, "top_k_groups": 2}
    assert topk_gate(logits, 3, **groups).ids.tolist() == [[0, 2, 3]]
    assert topk_gate(logits, 3, group_score="top2_sum", **groups).ids.tolist() == [[2, 4, 3]]


@pytest.mark.parametrize(
    ("logits", "ids"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),  # equal groups: the lowest
        ([NAN, 9.0, 0.0, 0.0, 1.0, 1.0], [4, 5, 2, 3]),  # a NaN member spoils the sum
        ([NAN, NAN, NAN, 1.0, NAN, NAN], [3, 0, 1, 2]),  # and that puts it last
    ],
)
def test_group_sums_are_ordered_as_scores_are(logits, ids):
    gate = topk_gate(
        torch.tensor([logits]), 4, num_groups=3, top_k_groups=2, group_score="top2_sum"
    )
    assert gate.ids.tolist() == [ids]


def test_experts_that_are_not_resident_act_as_if_they_were_not_there():
    # Of exp(logits) = 1, NaN, 5, 3 experts 0 and 3 are resident.
    logits = torch.tensor([[0.0, NAN, math.log(5), math.log(3)]], requires_grad=True)
    gate = topk_gate(logits, 3, resident=torch.tensor([True, False, False, True]))
    assert gate.ids.tolist() == [[3, 0, -1]]
    assert gate.weights.tolist() == [pytest.approx([3 / 4, 1 / 4, 0])]
    assert gate.counts.tolist() == [1, 0, 0, 1]
    assert gate.prob_sum.tolist() == pytest.approx([1 / 4, 0, 0, 3 / 4])
    assert gate.z_sum.item() == pytest.approx(math.log(4) ** 2)
    (gate.weights.square().sum() + gate.z_sum).backward()
    assert logits.grad[0, 1:3].tolist() == [0.0, 0.0]
    assert logits.grad.isfinite().all()


def test_a_group_without_residents_is_never_taken():
    # Groups {0, 1}, {2, 3}, {4, 5}; the resident of the last is the worst of all.
    resident = torch.tensor([True, False, False, False, False, True])
    logits = torch.tensor([[1.0, 9.0, 9.0, 9.0, 9.0, -INF]])
    gate = topk_gate(logits, 3, num_groups=3, top_k_groups=2, resident=resident)
    assert gate.ids.tolist() == [[0, 5, -1]]


def test_without_residents_nothing_is_chosen():
    logits = torch.full((2, 3), NAN, requires_grad=True)
    gate = topk_gate(logits, 2, resident=torch.zeros(3, dtype=torch.bool))
    assert gate.ids.tolist() == [[-1, -1]] * 2
    assert gate.weights.tolist() == [[0.0, 0.0]] * 2
    (gate.weights.sum() + gate.prob_sum.sum() + gate.z_sum).backward()
    assert logits.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (torch.tensor(1.0), "0x1.764d5p-1"),
        (torch.tensor(-3.7), "0x1.8b4c0ep-6"),
        (torch.tensor(1.0, dtype=torch.float64), "0x1.764d4f5d5a2bdp-1"),
        (torch.tensor(-3.7, dtype=torch.float64), "0x1.8b4c0ffc14fbep-6"),
        (torch.tensor(-87.5), "0x0p+0"),
        (torch.tensor(17.5), "0x1p+0"),
    ],
)
def test_the_sigmoid_of_the_selection_has_the_bits_of_the_kernels(x, bits):
    # The same numbers stand in tests/cpp/test_score.cpp.
    assert sigmoid_bits(x).item() == float.fromhex(bits)


@pytest.mark.parametrize(
    ("logits", "ids"),
    [
        ([1.0, 3.0, 3.0, 1.0], [1, 2, 0, 3]),
        ([0.0, -0.0, 0.0, -0.0], [0, 1, 2, 3]),
        ([NAN, -INF, 0.0, INF], [3, 2, 1, 0]),
        ([-INF, NAN, -INF, NAN], [0, 2, 1, 3]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2, 3]),
    ],
)
def test_ties_go_to_the_lowest_index_and_nan_ranks_below_every_number(logits, ids):
    assert topk_gate(torch.tensor([logits]), 4).ids.tolist() == [ids]


def test_a_nan_logit_reaches_every_softmax_weight_but_only_its_own_sigmoid_weight():
    logits = torch.tensor([[NAN, 1.0, 2.0]])
    assert topk_gate(logits, 2).weights.isnan().all()
    assert topk_gate(logits, 3, score="sigmoid").weights.isnan().tolist() == [[False, False, True]]


def test_no_tokens_give_empty_choices_and_zero_sums():
    gate = topk_gate(torch.empty(0, 5), 3)
    assert gate.ids.shape == gate.weights.shape == (0, 3)
    assert gate.counts.tolist() == [0] * 5
    assert gate.prob_sum.tolist() == [0.0] * 5
    assert gate.z_sum.item() == 0.0


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_outputs_have_the_promised_dtypes(dtype, accumulation):
    gate = topk_gate(torch.randn(3, 4, dtype=dtype), 2)
    assert gate.ids.dtype == torch.int32
    assert gate.counts.dtype == torch.int64
    assert gate.weights.dtype == gate.prob_sum.dtype == gate.z_sum.dtype == accumulation


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_out_of_range_is_refused(top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, 4\], got {top_k}"):
        topk_gate(torch.zeros(1, 4), top_k)


def test_an_unknown_score_is_refused():
    with pytest.raises(
        ValueError, match=r"score must be .softmax., .sigmoid. or .unit., got .tanh."
    ):
        topk_gate(torch.zeros(1, 4), 1, score="tanh")


def test_settings_that_do_not_fit_are_refused():
    logits = torch.zeros(1, 6)
    for arguments, message in (
        ({"num_groups": 4}, "num_groups must divide the 6 experts, got 4"),
        ({"num_groups": 3, "top_k_groups": 4}, r"top_k_groups must be in \[1, 3\], got 4"),
        ({"num_groups": 3}, "top_k_groups must be at least 2 for top_k = 3, got 1"),
        ({"group_score": "sum"}, "group_score must be 'max' or 'top2_sum', got 'sum'"),
        ({"bias": torch.zeros(6).double()}, "bias must be torch.float32 of shape"),
        ({"resident": torch.zeros(5, dtype=torch.bool)}, "resident must be torch.bool of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            topk_gate(logits, 3, **arguments)


@pytest.mark.parametrize("resident", [None, [True, False, True, False, True]])
@pytest.mark.parametrize("score_after_top_k", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "unit"])
def test_gradients_match_finite_differences(score, renormalize, score_after_top_k, resident):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    options = {
        "score": score,
        "score_after_top_k": score_after_top_k,
        "resident": None if resident is None else torch.tensor(resident),
        "renormalize": renormalize,
        "scale": 1.5,
    }

    def floats(logits):
        gate = topk_gate(logits, 4, **options)
        return gate.weights, gate.prob_sum, gate.z_sum

    assert torch.autograd.gradcheck(floats, logits)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_choices_equal_sorting_each_token_by_hand(data):
    # Few distinct values, so that ties are common.
    num_experts = data.draw(st.integers(1, 7))
    top_k = data.draw(st.integers(1, num_experts))
    value = st.sampled_from([NAN, -INF, -1.0, 0.0, 0.5, 2.0])
    row = st.lists(value, min_size=num_experts, max_size=num_experts)
    rows = data.draw(st.lists(row, max_size=5))

    gate = topk_gate(torch.tensor(rows).reshape(-1, num_experts), top_k)

    by_hand = [
        sorted(
            range(num_experts),
            key=lambda e: (math.isnan(row[e]), -row[e] if row[e] == row[e] else 0, e),
        )
        for row in rows
    ]
    assert gate.ids.tolist() == [ids[:top_k] for ids in by_hand]
    chosen = [expert for ids in by_hand for expert in ids[:top_k]]
    assert gate.counts.tolist() == [chosen.count(expert) for expert in range(num_experts)]
