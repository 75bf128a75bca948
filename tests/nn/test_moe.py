# SPDX-License-Identifier: Apache-2.0
"""The layer against a dense loop over tokens, with all experts resident and with ghosts."""

import copy
import io

import numpy
import pytest
import torch
from dense_loop import dense_loop
from torch import Tensor

from fomoe.nn import MoE, MoEConfig

DIM, NUM_EXPERTS = 5, 6


def config(**changes) -> MoEConfig:
    shape = {"dim": DIM, "expert_dim": 4, "num_experts": NUM_EXPERTS, "top_k": 2}
    return MoEConfig(**shape | changes)


def layer(resident_experts=None, **changes) -> MoE:
    """Random weights, biases too; a site has those rows of the full layer that it holds."""
    torch.manual_seed(0)
    full = MoE(config(**changes)).double()
    for name, tensor in full.state_dict().items():
        if name.endswith(("bias", "b1", "b2")):
            tensor.normal_()
    if resident_experts is None:
        return full
    moe = MoE(config(**changes), resident_experts).double()
    rows = list(resident_experts)
    moe.load_state_dict(
        {
            name: tensor[rows] if name.startswith("experts.") else tensor
            for name, tensor in full.state_dict().items()
        }
    )
    return moe


def gradients_of(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = loss + 0 * sum(tensor.sum() for tensor in named.values())  # the loop skips what it can
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


VARIANTS = {
    "mixtral": {"score_after_top_k": True},
    "scaled": {"renormalize": True, "scale": 2.5},
    "fomoe": {"activation": "silu", "score": "sigmoid"},
    "every expert": {"activation": "silu", "score": "sigmoid", "top_k": NUM_EXPERTS},
    "unit": {"score": "unit", "scale": 0.5},
    "deepseek v2": {"num_groups": 3, "top_k_groups": 2, "shared_expert_dim": 3},
    "deepseek v3": {
        "score": "sigmoid", "renormalize": True, "num_groups": 3, "top_k_groups": 2,
        "group_score": "top2_sum", "shared_expert_dim": 3, "bias_update_rate": 1e-3,
    },
    "gpt-oss": {"activation": "swiglu_clamped", "score_after_top_k": True, "has_bias": True},
    "qwen2": {"shared_expert_dim": 3, "shared_expert_gate": True},
    "biased shared silu": {"activation": "silu", "has_bias": True, "shared_expert_dim": 3},
    "converted": {"score": "unit", "router_bias": True, "shared_expert_dim": 3},
    "switch": {"top_k": 1, "capacity_factor": 1.25},
    "capacity": {"score": "sigmoid", "capacity_factor": 0.5, "bias_update_rate": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("router", ["full", "partitioned"])
@pytest.mark.parametrize(
    "resident", [None, (1, 2, 4), (5,), ()], ids=["all", "some", "one", "none"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_equal_a_dense_loop(variant, resident, router):
    moe = layer(resident, router=router, **VARIANTS[variant])
    x = tokens(7).requires_grad_()
    named = {"x": x, **dict(moe.named_parameters())}
    direction = tokens(7).flip(0)

    y, expected = moe(x), dense_loop(moe, x)

    torch.testing.assert_close(y, expected)
    gradients = gradients_of((y * direction).sum(), named)
    by_hand = gradients_of((expected * direction).sum(), named)
    for name in named:
        torch.testing.assert_close(
            gradients[name], by_hand[name], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_ghosts_router_row_learns_nothing_from_the_language_loss_with_sigmoid_gates():
    # Why averaging router rows over all sites dilutes them: only holders have a gradient.
    moe = layer((0, 3), activation="silu", score="sigmoid")
    x = tokens(50)
    moe(x).square().sum().backward()
    assert set(moe.router.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == {0, 3}

    moe.zero_grad()
    moe(x)
    moe.auxiliary_loss.backward()
    assert (moe.router.weight.grad.abs().sum(1) > 0).all()


def test_a_layer_without_residents_gives_zeros_and_trains_its_router_by_the_auxiliary_loss():
    moe = layer(())
    y = moe(tokens(8))
    (y.sum() + moe.auxiliary_loss).backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert moe.router.weight.grad.abs().sum() > 0
    assert moe.experts.w1.shape == (0, 8, DIM)
    assert moe.statistics().ghost_share == 1.0


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_shape_is_kept(shape):
    moe = layer()
    x = tokens(*shape)
    y = moe(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, DIM), moe(x.reshape(-1, DIM)))


def test_a_batch_without_tokens_trains_without_nan():
    moe = layer()
    (moe(tokens(0)).sum() + moe.auxiliary_loss).backward()
    assert moe.auxiliary_loss.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in moe.parameters())


def test_non_contiguous_input_is_accepted():
    moe, x = layer(), tokens(4, 3)
    assert torch.equal(moe(x.transpose(0, 1)), moe(x.transpose(0, 1).contiguous()))


@pytest.mark.parametrize("resident", [None, (1, 3)])
def test_a_copy_made_after_a_forward_computes_the_same(resident):
    moe, x = layer(resident), tokens(9)
    y = moe(x)
    saved = io.BytesIO()
    torch.save(moe, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(moe), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(x), y)
        assert torch.equal(twin.auxiliary_loss, moe.auxiliary_loss)


def test_the_state_holds_the_parameters_only_and_restores_the_layer():
    moe, x = layer((1, 3)), tokens(9)
    state = moe.state_dict()
    twin = MoE(config(), (1, 3)).double()
    twin.load_state_dict(state)
    assert list(state) == ["router.weight", "experts.w1", "experts.w2"]
    assert torch.equal(twin(x), moe(x))


def test_the_layer_survives_a_change_of_dtype():
    moe, x = layer((1, 3)), tokens(9)
    y = moe(x)
    assert torch.equal(moe.bfloat16().double()(x).sign(), moe(x).sign())
    assert moe.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(moe(x.bfloat16()).double(), y, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("resident", "message"),
    [
        ((0, 6), r"resident_experts\[1\]: expected an id in \[0, 6\), got 6"),
        ((-1,), r"resident_experts\[0\]: expected an id in \[0, 6\), got -1"),
        ((2, 2), r"resident_experts\[1\]: expected ascending ids .* got 2 after 2"),
        ((3, 1), r"resident_experts\[1\]: expected ascending ids .* got 1 after 3"),
        ((0.0,), r"resident_experts\[0\]: expected an id in \[0, 6\), got 0.0"),
    ],
)
def test_residents_that_do_not_fit_are_refused(resident, message):
    with pytest.raises(ValueError, match=message):
        MoE(config(), resident)


@pytest.mark.parametrize("shape", [(3, DIM + 1), ()])
def test_input_of_another_width_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected input of shape \(\.\.\., 5\), got \("):
        layer()(torch.zeros(shape, dtype=torch.float64))


def test_input_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"weights' dtype torch.float64, got torch.float32"):
        layer()(torch.zeros(3, DIM))


@pytest.mark.parametrize("resident", [None, (1, 3)])
def test_a_layer_made_on_meta_and_loaded_computes_the_same(resident):
    moe, x = layer(resident), tokens(9)
    with torch.device("meta"):
        late = MoE(config(), resident).double()
    late = late.to_empty(device="cpu")
    late.load_state_dict(moe.state_dict())
    assert torch.equal(late(x), moe(x))
    assert late.statistics() == moe.statistics()


def test_residents_may_be_integers_of_any_kind():
    assert MoE(config(), numpy.array([1, 3])).experts.expert_ids == (1, 3)
