# SPDX-License-Identifier: Apache-2.0
"""The configurations on the layer's page are the published models': equal to Hugging Face's blocks.

The sizes come from the classes' defaults where those are the model's, else from its config.json.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from pages import DOCS, run
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from fomoe import MoE, MoEConfig
from fomoe.models.configurations import CONFIGURATIONS

DIM, WIDTH = 16, 8


@dataclass(frozen=True, slots=True)
class Published:
    config: type
    block: type
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    width: str = "moe_intermediate_size"


MODELS = {
    "mixtral_8x7b": Published(
        transformers.MixtralConfig, MixtralSparseMoeBlock, width="intermediate_size"
    ),
    "qwen3_30b_a3b": Published(
        transformers.Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, {"norm_topk_prob": True}
    ),
    "qwen1_5_moe_a2_7b": Published(transformers.Qwen2MoeConfig, Qwen2MoeSparseMoeBlock),
    "olmoe_1b_7b": Published(
        transformers.OlmoeConfig,
        OlmoeSparseMoeBlock,
        {"intermediate_size": 1024},
        width="intermediate_size",
    ),
    "deepseek_v2": Published(
        transformers.DeepseekV2Config,
        DeepseekV2Moe,
        {
            "hidden_size": 5120,
            "num_attention_heads": 1,  # divides every width
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v3": Published(transformers.DeepseekV3Config, DeepseekV3MoE),
    "gpt_oss_120b": Published(transformers.GptOssConfig, GptOssMLP, width="intermediate_size"),
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return run(DOCS / "layer.md")


def reduced(config: MoEConfig) -> MoEConfig:
    """The same router and experts with narrow matrices."""
    shared = config.shared_expert_dim // config.expert_dim * WIDTH
    return dataclasses.replace(config, dim=DIM, expert_dim=WIDTH, shared_expert_dim=shared)


def hugging_face(published: Published, **settings: Any) -> Any:
    return published.config(**{**published.settings, **settings}, experts_implementation="eager")


def reduced_block(published: Published, config: MoEConfig) -> nn.Module:
    sizes = {"hidden_size": DIM, published.width: WIDTH}
    if published.config is transformers.Qwen2MoeConfig:
        sizes["shared_expert_intermediate_size"] = config.shared_expert_dim
    block = published.block(hugging_face(published, **sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.normal_(generator=generator)
    return block.eval()


def state_of(block: nn.Module, gpt_oss_state: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """A block's weights under our names, by the table of the page."""
    if isinstance(block, GptOssMLP):
        return gpt_oss_state(block)
    given = block.state_dict()
    for prefix in ("shared_experts", "shared_expert"):
        halves = [given.pop(f"{prefix}.{half}_proj.weight", None) for half in ("gate", "up")]
        if halves[0] is not None:
            given["shared_expert.w1"] = torch.cat(halves)
    names = {
        "gate.weight": "router.weight",
        "experts.gate_up_proj": "experts.w1",
        "experts.down_proj": "experts.w2",
        "gate.e_score_correction_bias": "load_balancer.bias",
        "shared_experts.down_proj.weight": "shared_expert.w2",
        "shared_expert.down_proj.weight": "shared_expert.w2",
        "shared_expert_gate.weight": "shared_expert.gate.weight",
    }
    return {names.get(name, name): tensor for name, tensor in given.items()}


def test_every_configuration_on_the_page_is_compared(page):
    configurations = {name for name, value in page.items() if isinstance(value, MoEConfig)}
    assert configurations == {*MODELS, "fomoe_150m"}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_model(page, name):
    ours, theirs = page[name], hugging_face(MODELS[name])
    count = "n_routed_experts" if name.startswith("deepseek") else "num_local_experts"
    num_experts = getattr(theirs, count, None) or theirs.num_experts
    expected = (theirs.hidden_size, getattr(theirs, MODELS[name].width), num_experts)
    assert (ours.dim, ours.expert_dim, ours.num_experts) == expected
    assert ours.top_k == theirs.num_experts_per_tok
    shared = getattr(theirs, "shared_expert_intermediate_size", 0)
    shared += getattr(theirs, "n_shared_experts", 0) * ours.expert_dim
    assert ours.shared_expert_dim == shared


@pytest.mark.parametrize("name", MODELS)
def test_output_and_input_gradient_equal_the_block_of_transformers(page, name):
    config = reduced(page[name])
    block, moe = reduced_block(MODELS[name], config), MoE(config)
    moe.load_state_dict(state_of(block, page["gpt_oss_state"]))
    tokens, direction = torch.randn(2, 2, 20, DIM, generator=torch.Generator().manual_seed(1))
    results = []
    for layer in (moe, block):
        x = tokens.clone().requires_grad_()
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(direction)  # through experts and router
        results.append((y.detach(), x.grad))
    for actual, expected in zip(*results, strict=True):
        tolerance = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance)


def test_fomoe_is_the_paper_s_second_size(page):
    model = CONFIGURATIONS["fomoe-153m"]
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    for field in fields & {field.name for field in dataclasses.fields(model)}:
        assert getattr(page["fomoe_150m"], field) == getattr(model, field)
    moe = MoE(reduced(page["fomoe_150m"]))
    assert moe(torch.ones(3, DIM)).shape == (3, DIM)


def test_the_balance_loss_of_transformers_is_top_k_times_ours():
    config = MoEConfig(
        dim=DIM,
        expert_dim=WIDTH,
        num_experts=6,
        top_k=2,
        z_loss_coefficient=0,
        balance_loss_coefficient=1,
    )
    moe, x = MoE(config), torch.randn(20, DIM, generator=torch.Generator().manual_seed(0))
    moe(x)
    theirs = load_balancing_loss_func((moe.router(x),), num_experts=6, top_k=2)
    torch.testing.assert_close(2 * moe.auxiliary_loss, theirs)
