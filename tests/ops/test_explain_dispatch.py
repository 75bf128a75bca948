# SPDX-License-Identifier: Apache-2.0
"""explain_dispatch: which matrix kernels a call takes, asked for cards that are not here."""

import pytest
import torch
from samples import Sample

from fomoe import Dispatch, explain_dispatch

# Widths that tensor cores take.
SAMPLE = Sample(name="even", tokens=30, experts=4, top_k=2, dim=32, expert_dim=16)
CARDS = {(8, 0): "sm80", (8, 6): "sm80", (8, 9): "sm80", (9, 0): "sm90", (10, 0): "sm80"}


def layer(dtype=torch.bfloat16, **changes):
    arguments = {
        "x": SAMPLE.x(dtype),
        "weights": SAMPLE.weights(dtype),
        "w1": SAMPLE.w1(dtype),
        "w2": SAMPLE.w2(dtype),
        "routing": SAMPLE.routing(),
    }
    return arguments | changes


def product(dtype=torch.bfloat16, **changes):
    rows = SAMPLE.rows(dtype, SAMPLE.dim)
    return {"rows": rows, "weight": SAMPLE.w1(dtype), "offsets": SAMPLE.routing().offsets} | changes


def on_hopper(op, arguments):
    return explain_dispatch(op, **arguments, compute_capability=(9, 0))


def shifted(tensor):
    """The same values, one element after an aligned address."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(("capability", "kernels"), CARDS.items())
def test_hopper_takes_its_own_kernels_and_other_cards_those_of_ampere(capability, kernels):
    for op, arguments in (("expert_mlp", layer()), ("grouped_gemm", product())):
        answer = explain_dispatch(op, **arguments, compute_capability=capability)
        assert answer.kernels == kernels
        assert f"compute capability {capability[0]}.{capability[1]}" in answer.reason


def test_float32_runs_on_cuda_cores():
    for op, arguments in (
        ("expert_mlp", layer(torch.float32)),
        ("grouped_gemm", product(torch.float32)),
    ):
        answer = on_hopper(op, arguments)
        assert answer.kernels == "simple"
        assert answer.reason.endswith("but the dtype is neither bfloat16 nor float16")


@pytest.mark.parametrize("argument", ["x", "w1", "w2", "b1", "b2"])
def test_one_misaligned_tensor_takes_the_tensor_cores_away(argument):
    biases = {"b1": SAMPLE.b1(torch.bfloat16), "b2": SAMPLE.b2(torch.bfloat16)}
    arguments = layer(**biases)
    assert on_hopper("expert_mlp", arguments).kernels == "sm90"
    arguments[argument] = shifted(arguments[argument])
    answer = on_hopper("expert_mlp", arguments)
    assert answer.kernels == "simple"
    assert answer.reason.endswith("but an array does not begin at a multiple of 16 bytes")


def test_an_odd_width_takes_the_tensor_cores_away():
    narrow = product(
        rows=SAMPLE.rows(torch.bfloat16, 28), weight=SAMPLE.w1(torch.bfloat16)[..., :28]
    )
    answer = on_hopper("grouped_gemm", narrow)
    assert answer.kernels == "simple"
    assert answer.reason.endswith("but a width is not a multiple of 8 elements")


def test_a_dense_copy_is_aligned_whatever_it_was_copied_from():
    spread = torch.empty(*SAMPLE.x(torch.bfloat16).shape, 2, dtype=torch.bfloat16)[..., 1]
    assert on_hopper("expert_mlp", layer(x=spread)).kernels == "sm90"


def test_a_transposed_weight_is_used_as_it_lies():
    transposed = SAMPLE.w1(torch.bfloat16).mT.contiguous()
    turned = product(weight=transposed, transpose_weight=True)
    assert on_hopper("grouped_gemm", turned).kernels == "sm90"
    as_view = product(weight=transposed.mT)
    assert on_hopper("grouped_gemm", as_view).kernels == "sm90"


def test_few_rows_per_expert_are_decoding():
    few = Sample(name="few", tokens=8, experts=8, top_k=2, dim=32, expert_dim=16)
    more = Sample(name="more", tokens=9, experts=8, top_k=2, dim=32, expert_dim=16)
    for sample, kernels in ((few, "decode"), (more, "sm90")):
        x, weights = sample.x(torch.bfloat16), sample.weights(torch.bfloat16)
        w1, w2 = sample.w1(torch.bfloat16), sample.w2(torch.bfloat16)
        arguments = {"x": x, "weights": weights, "w1": w1, "w2": w2, "routing": sample.routing()}
        assert on_hopper("expert_mlp", arguments).kernels == kernels
        in_float32 = {name: t.float() for name, t in arguments.items() if name != "routing"}
        answer = on_hopper("expert_mlp", in_float32 | {"routing": sample.routing()})
        assert answer.kernels == "simple"


def test_tensors_of_the_cpu_take_the_cpu():
    answer = explain_dispatch("expert_mlp", **layer())
    assert answer.kernels == "cpu"
    assert "AVX512-BF16" in answer.reason
    assert "AVX512-BF16" not in explain_dispatch("expert_mlp", **layer(torch.float32)).reason


def test_arguments_may_be_given_by_position():
    rows, weight, offsets = product().values()
    answer = explain_dispatch("grouped_gemm", rows, weight, offsets, compute_capability=(8, 0))
    assert answer.kernels == "sm80"


def test_older_cards_have_none():
    answer = explain_dispatch("grouped_gemm", **product(), compute_capability=(7, 5))
    assert answer == Dispatch("none", "the CUDA kernels need compute capability 8.0 or newer")


def test_arguments_that_do_not_fit_get_the_error_of_the_op():
    with pytest.raises(RuntimeError, match="expert_mlp: w1 must be bfloat16, got float32"):
        explain_dispatch("expert_mlp", **layer(w1=SAMPLE.w1(torch.float32)))


def test_an_op_without_a_choice_is_refused():
    with pytest.raises(ValueError, match="op must be grouped_gemm or expert_mlp, got 'permute'"):
        explain_dispatch("permute", SAMPLE.x(torch.bfloat16), SAMPLE.routing())
