# SPDX-License-Identifier: Apache-2.0
"""The gate's specification against hand-worked numbers and a loop over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe.reference import topk_gate

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


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_match_finite_differences(score, renormalize):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def floats(logits):
        gate = topk_gate(logits, 2, score=score, renormalize=renormalize, scale=1.5)
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
