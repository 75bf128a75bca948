# SPDX-License-Identifier: Apache-2.0
"""The layer against a dense loop over tokens, with all experts resident and with ghosts."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomoe.nn import MoE, MoEConfig

DIM, NUM_EXPERTS = 6, 5


def config(**changes) -> MoEConfig:
    shape = {"dim": DIM, "expert_dim": 4, "num_experts": NUM_EXPERTS, "top_k": 2}
    return MoEConfig(**shape | changes)


def layer(resident_experts=None, **changes) -> MoE:
    torch.manual_seed(0)
    full = MoE(config(**changes)).double()
    if resident_experts is None:
        return full
    moe = MoE(config(**changes), resident_experts).double()
    rows = list(resident_experts)
    moe.load_state_dict(
        {
            "router.weight": full.router.weight,
            "experts.w1": full.experts.w1[rows],
            "experts.w2": full.experts.w2[rows],
        }
    )
    return moe


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense_loop(moe: MoE, x: Tensor) -> Tensor:
    """One token and one chosen expert at a time; experts that are not resident are left out."""
    outputs = []
    for token in x:
        logits = moe.router.weight @ token
        probabilities = logits.softmax(0) if moe.config.score == "softmax" else logits.sigmoid()
        chosen = logits.argsort(descending=True)[: moe.config.top_k].tolist()
        weights = probabilities[chosen]
        if moe.config.renormalize:
            weights = weights / weights.sum()
        y = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen, strict=True):
            if expert not in moe.experts.expert_ids:
                continue
            row = moe.experts.expert_ids.index(expert)
            hidden = moe.experts.w1[row] @ token
            if moe.config.activation == "swiglu":
                gate, up = hidden.chunk(2)
                hidden = F.silu(gate) * up
            else:
                hidden = F.silu(hidden)
            y = y + moe.config.scale * weight * (moe.experts.w2[row] @ hidden)
        outputs.append(y)
    return torch.stack(outputs)


VARIANTS = [
    {"activation": "swiglu", "score": "softmax"},
    {"activation": "swiglu", "score": "softmax", "renormalize": True, "scale": 2.5},
    {"activation": "silu", "score": "sigmoid"},
    {"activation": "silu", "score": "sigmoid", "top_k": NUM_EXPERTS},
]


@pytest.mark.parametrize("resident", [None, (1, 2, 4), ()], ids=["all", "some", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_equal_a_dense_loop_without_the_ghosts(variant, resident):
    moe = layer(resident, **variant)
    x = tokens(7).requires_grad_()
    parameters = [x, *moe.parameters()]
    direction = tokens(7).flip(0)

    y, expected = moe(x), dense_loop(moe, x)

    torch.testing.assert_close(y, expected)
    if resident == ():  # the loop's zeros have no graph
        assert torch.equal(y, torch.zeros_like(x))
        return
    gradients = torch.autograd.grad((y * direction).sum(), parameters)
    by_hand = torch.autograd.grad((expected * direction).sum(), parameters)
    torch.testing.assert_close(gradients, by_hand)


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


def test_the_same_input_gives_the_same_bits():
    moe, x = layer(), tokens(20)
    assert torch.equal(moe(x), moe(x))


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
        ((0, 5), r"resident_experts\[1\]: expected an id in \[0, 5\), got 5"),
        ((-1,), r"resident_experts\[0\]: expected an id in \[0, 5\), got -1"),
        ((2, 2), r"resident_experts\[1\]: expected ascending ids .* got 2 after 2"),
        ((3, 1), r"resident_experts\[1\]: expected ascending ids .* got 1 after 3"),
        ((0.0,), r"resident_experts\[0\]: expected an id in \[0, 5\), got 0.0"),
    ],
)
def test_residents_that_do_not_fit_are_refused(resident, message):
    with pytest.raises(ValueError, match=message):
        MoE(config(), resident)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim: expected an integer of at least 1, got 0"),
        ({"expert_dim": 2.0}, "expert_dim: expected an integer of at least 1, got 2.0"),
        ({"num_experts": True}, "num_experts: expected an integer of at least 1, got True"),
        ({"num_experts": 5000}, "num_experts: expected at most 4096, got 5000"),
        ({"top_k": 6}, "top_k: expected at most num_experts = 5, got 6"),
        ({"activation": "relu"}, "activation: expected one of swiglu, silu, got 'relu'"),
        ({"score": "unit"}, "score: expected one of softmax, sigmoid, got 'unit'"),
        ({"renormalize": 1}, "renormalize: expected true or false, got 1"),
        ({"scale": 0.0}, "scale: expected a finite number above 0, got 0.0"),
        ({"z_loss_coefficient": -1e-3}, "z_loss_coefficient: expected .* at least 0, got -0.001"),
        ({"balance_loss_coefficient": float("nan")}, "balance_loss_coefficient: .* got nan"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("shape", [(3, DIM + 1), ()])
def test_input_of_another_width_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected input of shape \(\.\.\., 6\), got \("):
        layer()(torch.zeros(shape, dtype=torch.float64))


def test_input_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"weights' dtype torch.float64, got torch.float32"):
        layer()(torch.zeros(3, DIM))
