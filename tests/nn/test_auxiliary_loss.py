# SPDX-License-Identifier: Apache-2.0
"""Balance and z loss against hand-worked routers, and when they are there."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fomoe.nn import MoE, MoEConfig, auxiliary_loss


def layer(*, balance=1.0, z=0.0, resident=None, **changes) -> MoE:
    """Router logits are log 3 times the input's entries, for 2 experts."""
    shape = {"dim": 2, "expert_dim": 4, "num_experts": 2, "top_k": 1} | changes
    config = MoEConfig(**shape, balance_loss_coefficient=balance, z_loss_coefficient=z)
    moe = MoE(config, resident)
    with torch.no_grad():
        moe.router.weight.copy_(math.log(3) * torch.eye(2))
    return moe


FIRST, SECOND = [1.0, 0.0], [0.0, 1.0]  # softmax of the logits: (3/4, 1/4) and (1/4, 3/4)


def test_balance_loss_is_one_for_a_balanced_router():
    moe = layer()
    moe(torch.tensor([FIRST, SECOND]))
    assert moe.auxiliary_loss.item() == pytest.approx(1.0)


def test_balance_loss_of_a_lopsided_router_worked_by_hand():
    # Loads 3/4 and 1/4; mean probabilities (3*3/4 + 1/4)/4 = 5/8 and 3/8.
    moe = layer()
    moe(torch.tensor([FIRST, FIRST, FIRST, SECOND]))
    assert moe.auxiliary_loss.item() == pytest.approx(2 * (3 / 4 * 5 / 8 + 1 / 4 * 3 / 8))


def test_balance_loss_counts_ghosts_like_everyone():
    x = torch.tensor([FIRST, FIRST, FIRST, SECOND])
    full, site = layer(), layer(resident=[1])
    full(x), site(x)
    assert torch.equal(site.auxiliary_loss, full.auxiliary_loss)


def test_balance_loss_with_sigmoid_uses_scores_normalised_over_experts():
    # sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2: probabilities 3/5 and 2/5.
    moe = layer(score="sigmoid")
    moe(torch.tensor([FIRST]))
    assert moe.auxiliary_loss.item() == pytest.approx(2 * 3 / 5)


def test_z_loss_is_the_mean_squared_logsumexp():
    # logsumexp(log 3, 0) = log 4 and logsumexp(0, 0) = log 2.
    moe = layer(balance=0.0, z=0.5)
    moe(torch.tensor([FIRST, [0.0, 0.0]]))
    expected = 0.5 * (math.log(4) ** 2 + math.log(2) ** 2) / 2
    assert moe.auxiliary_loss.item() == pytest.approx(expected)


def test_following_the_loss_evens_out_the_probabilities():
    moe = layer()
    x = torch.tensor([FIRST] * 3 + [SECOND])
    moe(x)
    moe.auxiliary_loss.backward()
    with torch.no_grad():
        before = (x @ moe.router.weight.T).softmax(1).mean(0)
        moe.router.weight -= moe.router.weight.grad
        after = (x @ moe.router.weight.T).softmax(1).mean(0)
    assert after[0] < before[0]


def test_the_loss_is_the_last_forwards():
    moe = layer()
    moe(torch.tensor([FIRST]))
    first = moe.auxiliary_loss
    moe(torch.tensor([FIRST, SECOND]))
    assert moe.auxiliary_loss.item() == pytest.approx(1.0)
    (first + moe.auxiliary_loss).backward()  # both graphs are still there


def test_a_forward_without_gradients_leaves_a_loss_without_graph():
    moe = layer()
    with torch.no_grad():
        moe(torch.tensor([FIRST, SECOND]))
        assert not moe.auxiliary_loss.requires_grad
    with torch.inference_mode():
        moe(torch.tensor([FIRST, SECOND]))
        assert moe.auxiliary_loss.item() == pytest.approx(1.0)
    moe(torch.tensor([FIRST, SECOND]))
    moe.auxiliary_loss.backward()


def test_a_loss_that_would_silently_do_nothing_is_refused():
    moe = layer()
    x = torch.tensor([FIRST, SECOND]).requires_grad_()
    checkpoint(moe, x, use_reentrant=True)  # its first forward runs without gradients
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        _ = moe.auxiliary_loss
    assert moe.eval().auxiliary_loss.item() == pytest.approx(1.0)


def test_before_a_forward_there_is_no_loss():
    with pytest.raises(RuntimeError, match="auxiliary_loss is there after a forward"):
        _ = layer().auxiliary_loss


def test_a_models_loss_is_the_sum_over_its_layers():
    model = nn.Sequential(layer(), nn.Linear(2, 2), layer(z=1.0))
    model(torch.tensor([FIRST, SECOND]))
    expected = model[0].auxiliary_loss + model[2].auxiliary_loss
    torch.testing.assert_close(auxiliary_loss(model), expected)


def test_a_model_without_experts_has_no_loss():
    assert auxiliary_loss(nn.Linear(2, 2)).item() == 0.0
