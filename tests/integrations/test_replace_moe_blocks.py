# SPDX-License-Identifier: Apache-2.0
"""A model on our ops computes and learns what it did, and what does not fit is refused."""

import copy
import math

import pytest
import torch
import transformers
from tiny_models import MODELS, experts_of, pair, routers_of, tiny_model, tokens
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from fomoe.integrations.transformers import replace_moe_blocks
from fomoe.integrations.transformers.replace_gates import FAMILIES

# The gates of transformers compute in float32 whatever the dtype of the model.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 4e-6}
AFTER_TRAINING = 3e-5


def assert_near(actual, expected, relative):
    """The largest difference is at most ``relative`` of the largest expected value."""
    tolerance = relative * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_a_block_worked_by_hand():
    config = transformers.MixtralConfig(
        hidden_size=2,
        intermediate_size=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(2))
        block.experts.gate_up_proj.copy_(torch.tensor([[[1.0, 0], [3, 0]], [[0, 2], [0, 1]]]))
        block.experts.down_proj.copy_(torch.tensor([[[1.0], [0]], [[0], [5.0]]]))
    assert replace_moe_blocks(block) == 1
    y = block(torch.tensor([[[1.0, 0], [0, 1]]]))
    silu = [1 / (1 + math.exp(-1)), 2 / (1 + math.exp(-2))]
    # Each token likes the expert of its coordinate: silu(gate) * up, down, weight 1.
    torch.testing.assert_close(y, torch.tensor([[[silu[0] * 3, 0], [0, silu[1] * 5]]]))


def test_every_family_of_the_table_is_tested():
    assert {family.model for family in FAMILIES} == set(MODELS)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_original_before_and_after_a_step_of_sgd(name, dtype):
    models, x, logits, gradients = pair(name, dtype), tokens(), [], []
    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        output = model(x, labels=x)
        output.loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        optimizer.step()
        logits.append((output.logits.detach(), model(x).logits.detach()))
    (before, after), (expected_before, expected_after) = logits
    assert_near(before, expected_before, TOLERANCE[dtype])
    assert_near(after, expected_after, AFTER_TRAINING)
    assert (expected_after - expected_before).abs().max() > 1  # the step was no small one
    actual, expected = gradients
    for key in expected:
        assert expected[key].abs().max() > 0, key
        assert_near(actual[key], expected[key], AFTER_TRAINING)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_logits_differ_by_its_rounding(name):
    replaced, original = pair(name, torch.bfloat16)
    actual, expected = replaced(tokens()).logits, original(tokens()).logits
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert (actual - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_experts_alone_are_exact_where_the_gate_stays(name):
    original = experts_of(tiny_model(name))[0]
    ours = copy.deepcopy(original)
    ours.config._experts_implementation = "fomoe"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, original.hidden_dim, dtype=torch.float64, generator=generator)
    ids = torch.rand(11, original.num_experts, generator=generator).argsort(dim=1)[:, :3]
    weights = torch.rand(11, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(ours(x, ids, weights), original(x, ids, weights), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_same_tensors_under_the_same_names(name):
    model = tiny_model(name)
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    assert replace_moe_blocks(model) == 2
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("name", MODELS)
def test_router_logits_are_recorded_as_before(name):
    outputs = [model.model(tokens(), output_router_logits=True) for model in pair(name)]
    assert len(outputs[0].router_logits) == 2
    for actual, expected in zip(*(output.router_logits for output in outputs), strict=True):
        assert actual.dtype == expected.dtype
        assert_near(actual, expected, 2e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_the_auxiliary_loss_reaches_the_routers_as_before(name):
    gradients = []
    for model in pair(name):
        output = model(tokens(), output_router_logits=True)
        output.aux_loss.backward()
        gradients.append([router.weight.grad for router in routers_of(model)])
    for actual, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert_near(actual, expected, 2e-5)


def test_the_second_call_finds_nothing_to_do():
    model = tiny_model("olmoe")
    assert replace_moe_blocks(model) == 2
    assert replace_moe_blocks(model) == 0


def test_a_dense_model_has_no_blocks():
    config = transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=6,
        intermediate_size=7,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    assert replace_moe_blocks(transformers.LlamaForCausalLM(config)) == 0


def test_a_model_inside_another_module_is_found():
    model = tiny_model("mixtral")
    assert replace_moe_blocks(nn.ModuleList([nn.Linear(2, 2), model])) == 2
    assert model.config._experts_implementation == "fomoe"


def test_the_experts_of_transformers_can_be_set_again():
    replaced, original = pair("qwen3_moe")
    replaced.set_experts_implementation("eager")
    assert_near(replaced(tokens()).logits, original(tokens()).logits, 2e-6)
    assert replace_moe_blocks(replaced) == 2


def test_a_model_on_the_meta_device_is_replaced_before_its_weights_come():
    original = tiny_model("deepseek_v3", torch.float32)
    model = copy.deepcopy(original).to("meta")
    assert replace_moe_blocks(model) == 2
    assert model(tokens().to("meta")).logits.shape == (2, 13, 37)
    model.load_state_dict(original.state_dict(), assign=True)
    model.model.rotary_emb = original.model.rotary_emb  # its buffers are in no state dict
    assert_near(model(tokens()).logits, original(tokens()).logits, 2e-5)


def break_nothing_but(change):
    """A model whose second block is changed, and its modules' classes as they then are."""
    model = tiny_model("qwen3_moe")
    change(model.model.layers[2].mlp)
    return model, [type(module) for module in model.modules()]


class FP8Experts(nn.Module):
    """Stands for what a quantiser puts in place of the experts."""


def quantise_module(block):
    block.experts = FP8Experts()


def quantise_weights(block):
    weight = block.experts.down_proj
    block.experts.down_proj = nn.Parameter(weight.to(torch.int8), requires_grad=False)


def pack_weights(block):
    weight = block.experts.gate_up_proj.detach()
    block.experts.gate_up_proj = nn.Parameter(TwoTensor(weight, weight))


def wrap_experts(block):
    block.experts = nn.Sequential(block.experts)


def take_another_activation(block):
    block.experts.act_fn = nn.GELU()


def take_another_router(block):
    block.gate = nn.Linear(18, 5)


def part_experts(block):
    block.experts._is_expert_parallel = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantise_module, "layers.2.mlp.experts: expected one of .*Qwen3MoeExperts.* FP8Experts"),
        (quantise_weights, r"layers.2.mlp.experts: expected down_proj to have .* of torch.int8"),
        (
            pack_weights,
            "layers.2.mlp.experts: expected gate_up_proj .* plain tensor, got TwoTensor",
        ),
        (wrap_experts, r"layers.2.mlp.* beside Qwen3MoeTopKRouter, got experts \(Sequential\)"),
        (take_another_activation, "layers.2.mlp.experts: expected the activation silu, got GELU"),
        (take_another_router, "layers.2.mlp.experts: expected Qwen3MoeTopKRouter .* got none"),
        (part_experts, "layers.2.mlp.experts: expected _is_expert_parallel = False, got True"),
    ],
)
def test_a_block_that_does_not_fit_is_named_and_nothing_is_changed(change, message):
    model, classes = break_nothing_but(change)
    with pytest.raises(ValueError, match=message):
        replace_moe_blocks(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._experts_implementation == "eager"


def test_a_family_that_is_not_in_the_table_is_refused():
    config = transformers.GptOssConfig(
        hidden_size=8,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=5,
    )
    model = transformers.GptOssForCausalLM(config)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.*got GptOssExperts"):
        replace_moe_blocks(model)
    model.set_experts_implementation("fomoe")
    with pytest.raises(ValueError, match="GptOssExperts: expected has_bias = False, got True"):
        model(torch.tensor([[1, 2]]))


def test_a_choice_of_experts_that_is_not_ours_is_refused():
    model = tiny_model("deepseek_v2", topk_method="noaux_tc")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts: expected topk_method 'greedy' or"):
        replace_moe_blocks(model)
