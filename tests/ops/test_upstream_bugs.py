# SPDX-License-Identifier: Apache-2.0
"""Cases that other MoE kernels got wrong, and the tests that hold each of them.

Megatron#3626 stands for issue 3626 of that project; HF is transformers, TE TransformerEngine, ao
torchao, titan torchtitan. "Samples" are those of samples.py, on which every op meets the reference.
The kernels of tests/cpp run under AddressSanitizer and UBSan.

1. No tokens at all (Megatron#3626, Megatron#1877, TE#161): sample "no tokens",
   here::test_a_layer_without_tokens_gives_zero_gradients
2. No tokens for one expert (pytorch#152668) or for a site: samples "only ghosts are chosen", "a
   site without experts", test_expert_mlp::test_an_expert_without_tokens_gets_zero_gradients,
   test_grouped_gemm::test_the_gradients_of_the_tail_and_of_an_empty_expert_are_zero
3. All tokens for one expert (vLLM#43396): sample "one expert gets everything",
   here::test_8192_tokens_of_one_expert_are_all_moved
4. K = E and K = 1: samples "every expert is chosen", "one choice", "one expert",
   test_topk_gate_selection::test_all_of_4096_experts_can_be_chosen
5. Ties (Automodel#3140, titan#3336):
   test_topk_gate_selection::test_ties_go_to_the_lowest_index_and_nan_ranks_last,
   test_topk_gate_selection::test_a_score_larger_by_one_unit_in_the_last_place_wins
6. NaN and infinite logits (HF#45621):
   test_topk_gate_selection::test_ids_with_ties_nan_and_infinity_equal_the_reference,
   test_topk_gate::test_one_strange_token_gives_what_the_reference_gives,
   test_expert_mlp::test_tokens_do_not_see_each_other
7. Dropped by capacity (TE#2908): here::test_a_drop_is_a_choice_of_weight_zero,
   test_route::test_an_expert_keeps_the_slots_of_its_earliest_tokens
8. Beyond 2^31 elements (TE#2908): tests/cpp/test_address_space.cpp,
   test_route::test_more_slots_than_int32_counts_are_refused
9. Odd widths (pytorch#172440): all samples,
   test_layouts::test_the_layout_of_the_tensors_changes_no_result
10. Strides (HF#48644): sample "not contiguous",
   test_layouts::test_the_layout_of_the_tensors_changes_no_result
11. Type of the indices (TE#2908): here::test_int64_indices_are_refused_by_name
12. Gradients (TE#1336, HF#48687): test_gradients_pass_gradcheck of every op,
   here::test_the_gradient_of_the_router_passes_gradcheck_with_ghosts_and_drops
13. Registration (Tutel#190): test_registration::test_the_registration_passes_opcheck
14. Compiled whole and once (titan#3193):
   test_registration::test_a_layer_compiles_whole_and_once_for_all_token_counts,
   test_route::test_a_capacity_that_follows_the_tokens_compiles_once
15. Captured by a CUDA graph (pytorch#169970): needs a GPU
16. Same bits from run to run (FLUX#169, ao#4469, pytorch#186365):
   test_determinism::test_two_runs_give_the_same_bits
17. Same bits when recomputed (Automodel#3140, Automodel#3156, titan#3336):
   here::test_a_recomputed_layer_makes_the_same_choices_among_ties
18. Expert parallelism (HF#48205, HF#48687): needs several processes; its sums here,
   here::test_sites_that_share_the_experts_add_up_to_one_site
19. Unequal tokens per process (Megatron#3626, titan#3193): needs several processes
20. Compute sanitizer (vLLM#43396): needs a GPU
21. Unwritten memory (HF#48205, axolotl#3827):
   test_poison::test_what_lies_in_new_memory_changes_no_result
22. Backward twice (ScatterMoE writes over what it saved):
   here::test_the_graph_can_be_run_backward_twice; and of a backward:
   test_topk_gate::test_double_backward_is_refused,
   test_combine::test_differentiating_the_weighted_backward_is_refused,
   test_grouped_gemm::test_differentiating_the_weight_gradient_is_refused,
   test_expert_mlp::test_double_backward_is_refused
"""

import dataclasses
import re
from pathlib import Path

import op_calls
import pytest
import torch
from op_calls import assert_same_bits, call_of, gradients_of, outputs_of
from samples import SAMPLE, Sample, assert_close, gradient_like, leaf
from torch.utils.checkpoint import checkpoint

from fomoe import ops, reference

LAYER = Sample(name="layer", tokens=12, experts=6, top_k=3, dim=5, expert_dim=3)
INDICES = [
    (name, index)
    for name in ("route", "permute", "combine", "grouped_gemm", "expert_mlp swiglu")
    for index, tensor in call_of(name, SAMPLE, torch.float32)[1].items()
    if tensor.dtype == torch.int32
]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def leaves_of(sample):
    """logits, x, w1, w2 of all experts."""
    tensors = (sample.logits, sample.x, sample.w1, sample.w2)
    return [leaf(tensor(torch.float64)) for tensor in tensors]


def layer(logits, x, w1, w2, residents, capacity=None, **settings):
    """Gate, route and the resident experts of the sample LAYER."""
    expert_map = torch.full((LAYER.experts,), -1, dtype=torch.int32)
    expert_map[residents] = torch.arange(len(residents), dtype=torch.int32)
    gate = ops.topk_gate(logits, LAYER.top_k, **settings)
    routing = ops.route(gate.ids, expert_map, len(residents), capacity=capacity)
    return ops.expert_mlp(x, gate.weights, w1[residents], w2[residents], routing)


def test_the_table_names_tests_that_exist():
    named = re.findall(r"(\w+)::(test_\w+)", __doc__)
    assert len(named) > 20
    for module, test in named:
        path = Path(__file__ if module == "here" else f"{Path(__file__).parent}/{module}.py")
        assert f"\ndef {test}(" in path.read_text(), test
    assert (Path(__file__).parents[1] / "cpp" / "test_address_space.cpp").exists()


def test_a_layer_without_tokens_gives_zero_gradients():
    # Megatron#3626, Megatron#1877: a rank without tokens crashed or hung. TE#161: shape mismatch.
    _, _, w1, w2 = leaves_of(LAYER)
    logits = torch.zeros(0, LAYER.experts, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(0, LAYER.dim, dtype=torch.float64, requires_grad=True)
    y = layer(logits, x, w1, w2, range(LAYER.experts))
    y.sum().backward()
    assert (y.shape, x.grad.shape, logits.grad.shape) == (x.shape, x.shape, logits.shape)
    assert not w1.grad.any()
    assert not w2.grad.any()


def test_8192_tokens_of_one_expert_are_all_moved():
    # vLLM#43396: illegal access at 8192 tokens.
    x = torch.arange(8192 * 3, dtype=torch.float32).reshape(8192, 3)
    routing = ops.route(torch.full((8192, 1), 2, dtype=torch.int32), int32([1, -1, 0, 2]), 3)
    assert routing.offsets.tolist() == [0, 8192, 8192, 8192]
    rows = ops.permute(x, routing)
    assert torch.equal(rows, x)
    assert torch.equal(ops.combine(rows, torch.full((8192, 1), 2.0), routing), 2 * x)


def test_512_experts_equal_the_reference():
    # FLUX#186: wrong results at 512 experts.
    sample = Sample(name="many", tokens=64, experts=512, top_k=8, dim=6, expert_dim=3)
    results = []
    for module in (ops, reference):
        logits, x, w1, w2 = leaves_of(sample)
        gate = module.topk_gate(logits, sample.top_k)
        routing = module.route(gate.ids, sample.expert_map(), sample.experts)
        y = module.expert_mlp(x, gate.weights, w1, w2, routing)
        y.backward(gradient_like(y))
        results.append([y, logits.grad, x.grad, w1.grad, w2.grad])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float64)


def test_the_first_slot_of_the_first_token_at_expert_0_counts():
    # sglang#26473: expert 0 was skipped. Token, slot, row and expert are all 0 here.
    routing = ops.route(int32([[0]]), int32([0]), 1)
    x, weights = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    assert ops.combine(ops.permute(x, routing), weights, routing).tolist() == [[6]]
    w1, w2 = torch.tensor([[[100.0], [5.0]]]), torch.tensor([[[7.0]]])  # silu(300) = 300
    assert ops.expert_mlp(x, weights, w1, w2, routing).item() == 2 * 7 * 300 * 15


def test_a_token_that_chooses_an_expert_twice_gets_both_weights():
    # flashinfer#3011: duplicate experts. Expert 1 is chosen twice by each token; 0 is a ghost.
    twice = ops.route(int32([[1, 1, 0], [0, 1, 1]]), int32([-1, 0]), 1)
    assert twice.slot_to_row.tolist() == [[0, 1, -1], [-1, 2, 3]]
    once = ops.route(int32([[1], [1]]), int32([-1, 0]), 1)
    results = []
    for routing, values in ((twice, [[2, 3, 9], [9, 0.5, 7]]), (once, [[5], [7.5]])):
        x, w1, w2 = leaves_of(dataclasses.replace(LAYER, tokens=2, experts=1))[1:]
        weights = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        y = ops.expert_mlp(x, weights, w1, w2, routing)
        y.backward(gradient_like(y))
        results.append([y, x.grad, w1.grad, w2.grad, weights.grad])
    *both, d_both = results[0]
    *one, d_one = results[1]
    for actual, expected in zip(both, one, strict=True):
        assert_close(actual, expected, torch.float64)
    (a,), (b,) = d_one
    expected = torch.tensor([[a, a, 0], [0, b, b]], dtype=torch.float64)
    assert_close(d_both, expected, torch.float64)


def test_a_drop_is_a_choice_of_weight_zero():
    # TE#2908: the -1 of a dropped row was taken for an index.
    logits, x, w1, w2 = leaves_of(LAYER)
    gate = ops.topk_gate(logits, LAYER.top_k)
    all_experts = torch.arange(LAYER.experts, dtype=torch.int32)
    dropping = ops.route(gate.ids, all_experts, LAYER.experts, capacity=4)
    keeping = ops.route(gate.ids, all_experts, LAYER.experts)
    kept = dropping.slot_to_row >= 0
    assert 0 < kept.sum() < kept.numel()
    results = []
    for routing, weights in ((dropping, gate.weights), (keeping, gate.weights * kept)):
        y = ops.expert_mlp(x, weights, w1, w2, routing)
        inputs = (gate.weights, x, w1, w2)
        gradients = torch.autograd.grad(y, inputs, gradient_like(y), retain_graph=True)
        results.append([y, *gradients])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float64)
    assert not results[0][1][~kept].any()


@pytest.mark.parametrize(("name", "index"), INDICES)
def test_int64_indices_are_refused_by_name(name, index):
    # TE#2908: indices of another width than the kernel's.
    function, tensors = call_of(name, SAMPLE, torch.float32)
    tensors[index] = tensors[index].long()
    op = name.split()[0]
    with pytest.raises(RuntimeError, match=f"fomoe::{op}: {index} must be int32, got int64"):
        function(**tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"renormalize": True},
        {"score": "sigmoid", "renormalize": True, "scale": 2.5},
        {"score_after_top_k": True},
    ],
    ids=["softmax", "sigmoid", "softmax after top-k"],
)
def test_the_gradient_of_the_router_passes_gradcheck_with_ghosts_and_drops(settings):
    # HF#48687: wrong gradient of the router where experts are elsewhere. TE#1336: of the permute.
    def y_of(logits, x):
        return layer(logits, x, w1, w2, residents=[4, 0, 1], capacity=3, **settings)

    logits, x, w1, w2 = leaves_of(LAYER)
    torch.autograd.gradcheck(y_of, (logits, x))


def test_sites_that_share_the_experts_add_up_to_one_site():
    # HF#48205: gradients of the router were not summed over the sites.
    results = []
    for sites in ([range(6)], [[4, 0, 1], [], [5, 2, 3]]):
        leaves = leaves_of(LAYER)
        y = sum(layer(*leaves, residents=site, renormalize=True) for site in sites)
        y.backward(gradient_like(y))
        results.append([y, *(tensor.grad for tensor in leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, torch.float64)


def test_a_recomputed_layer_makes_the_same_choices_among_ties():
    # Automodel#3140, Automodel#3156, titan#3336: ties flipped when activations were recomputed.
    choices, gradients = [], []
    router = torch.randn(3, LAYER.dim, generator=torch.Generator().manual_seed(0)).double()

    def forward(x, w1, w2):
        logits = x @ router.repeat(2, 1).T  # experts e and e + 3 tie
        choices.append(ops.topk_gate(logits, LAYER.top_k).ids)
        return layer(logits, x, w1, w2, residents=[4, 0, 1])

    for run in (forward, lambda *leaves: checkpoint(forward, *leaves, use_reentrant=False)):
        leaves = leaves_of(LAYER)[1:]
        y = run(*leaves)
        y.backward(gradient_like(y))
        gradients.append([y, *(tensor.grad for tensor in leaves)])
    assert len(choices) == 3
    assert_same_bits(choices[1:], choices[:1] * 2)
    assert_same_bits(*gradients)


@pytest.mark.parametrize("name", op_calls.DIFFERENTIABLE)
def test_the_graph_can_be_run_backward_twice(name):
    # ScatterMoE's backward writes over what the forward saved.
    outputs, leaves = outputs_of(*call_of(name, SAMPLE, torch.float32))
    first = gradients_of(outputs, leaves, retain_graph=True)
    assert first
    assert_same_bits(gradients_of(outputs, leaves), first)
