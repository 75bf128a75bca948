# SPDX-License-Identifier: Apache-2.0
"""Training of all layers together."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from fomoe.convert.dense import DenseWeights
from fomoe.convert.end_to_end import MaskedFeedForward, distill, fine_tune
from fomoe.convert.local_alignment import slopes
from fomoe.convert.methods import METHODS, LayerResult
from fomoe.convert.router import Choice, RouterWeights
from fomoe.convert.schedule import LAST_TEMPERATURE
from fomoe.convert.settings import Conversion
from fomoe.convert.sinkhorn import sinkhorn
from fomoe.errors import UserError
from fomoe.models import FeedForward
from fomoe.models.pretrained import load_dense

from .random_results import convert, random_results


@pytest.mark.parametrize("method", ["dot", "dot-literal"])
def test_for_the_error_of_its_own_output_the_plan_gets_the_slopes_of_the_local_stage(method):
    # There the loss is quadratic with curvature 1, which the layer has to find out by itself.
    torch.manual_seed(0)
    dense = FeedForward(8, 24).requires_grad_(False)
    expert = torch.randperm(24) % 4
    router = RouterWeights(torch.randn(4, 8), torch.randn(4))
    masked = MaskedFeedForward(dense, LayerResult(expert, router), Choice(2), METHODS[method])
    x = torch.randn(30, 8)
    output = masked(x)
    affinity = torch.autograd.grad((output - dense(x)).square().sum(), masked.affinity)

    gate, up = F.linear(x, dense.w1).chunk(2, dim=1)
    weights = DenseWeights(*dense.w1.chunk(2), dense.w2)
    chosen = Choice(2)(F.linear(x, *router))
    found = slopes(weights, F.silu(gate) * up, expert, chosen, corrected=METHODS[method].corrected)
    plan = sinkhorn(masked.affinity / LAST_TEMPERATURE, 6)
    expected = torch.autograd.grad(plan, masked.affinity, found.plan_HE)
    torch.testing.assert_close(affinity, expected, rtol=1e-3, atol=1e-4)


def test_steps_lower_the_loss_and_keep_the_size_of_experts(sources):
    dense, _ = load_dense(sources["llama"], dtype=torch.float32)
    dense.requires_grad_(False)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    text = torch.arange(4 * 32).view(4, 32) * 5 % 256
    steps = []
    conversion = Conversion(expert_size=8, batch_size=128, distill_steps=30, sequence_length=32)
    results = distill(
        dense, random_results(dense, 6), 2, METHODS["dot"], text, conversion, steps.append
    )
    assert sum(s.kl for s in steps[-5:]) < sum(s.kl for s in steps[:5])
    assert [result.expert.bincount().tolist() for result in results.values()] == [[8] * 6] * 3
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name])


def test_fine_tuning_lowers_the_loss_and_leaves_routers_and_the_dense_model_alone(sources):
    dense, _ = load_dense(sources["llama"], dtype=torch.float32)
    dense.requires_grad_(False)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    text = torch.arange(4 * 32).view(4, 32) * 5 % 256
    model = convert(dense, random_results(dense, 6), active_share=0.3)
    steps = []
    conversion = Conversion(expert_size=8, batch_size=128, fine_tune_steps=30, sequence_length=32)
    tuned = fine_tune(model, dense, text, conversion, steps.append)
    assert steps[-1].loss < steps[0].loss
    assert torch.equal(tuned.layers[0].moe.router.weight, model.layers[0].moe.router.weight)
    assert not torch.equal(tuned.embedding.weight, dense.embedding.weight)
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_16_bits_are_tuned_in_32_and_rounded_once(sources, dtype):
    text = torch.arange(4 * 32).view(4, 32) * 5 % 256
    conversion = Conversion(expert_size=8, batch_size=128, fine_tune_steps=8, sequence_length=32)
    dense, _ = load_dense(sources["llama"], dtype=dtype)
    model = convert(dense, random_results(dense, 6), active_share=0.3)
    tuned = fine_tune(model, dense, text, conversion, lambda step: None)
    wide = fine_tune(deepcopy(model).float(), dense, text, conversion, lambda step: None)
    for name, value in tuned.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == dtype
            assert torch.equal(value, wide.state_dict()[name].to(dtype)), name


def test_a_loss_that_is_not_finite_stops_the_training(sources):
    dense, _ = load_dense(sources["llama"], dtype=torch.float32)
    model = convert(dense, random_results(dense, 6), active_share=0.3)
    model.norm.weight.data[0] = float("nan")
    conversion = Conversion(expert_size=8, batch_size=128, fine_tune_steps=2, sequence_length=32)
    with pytest.raises(UserError, match="step 0 after alignment has a loss of nan"):
        fine_tune(model, dense, torch.arange(128).view(4, 32), conversion, lambda step: None)
