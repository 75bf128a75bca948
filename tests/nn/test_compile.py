# SPDX-License-Identifier: Apache-2.0
"""The layer under torch.compile and torch.export."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch.utils.checkpoint import checkpoint

from fomoe.nn import MoE, MoEConfig, auxiliary_loss, initialize, update_biases

SCORES = {
    "softmax": {},
    "softmax after top-k": {"score_after_top_k": True},
    "sigmoid": {"score": "sigmoid", "renormalize": True},
    "unit": {"score": "unit"},
}
DEEPSEEK = {
    "score": "sigmoid", "renormalize": True, "num_groups": 3, "top_k_groups": 2,
    "group_score": "top2_sum", "bias_update_rate": 0.05, "shared_expert_dim": 3,
}  # fmt: skip
GPT_OSS = {"activation": "swiglu_clamped", "score_after_top_k": True, "has_bias": True}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def layer(**changes) -> MoE:
    shape = {"dim": 8, "expert_dim": 4, "num_experts": 6, "top_k": 2}
    moe = MoE(MoEConfig(**shape | changes), resident_experts=[0, 2, 5])
    initialize(moe, seed=0)
    return moe


def tokens(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(num_tokens))


def step(model: nn.Module, function, x: Tensor) -> dict[str, Tensor]:
    """Everything that a training step gets from the model, called through ``function``."""
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    model.zero_grad()
    for moe in moes:
        moe.reset_statistics()
    x.requires_grad_()
    y = function(x)
    loss = auxiliary_loss(model)
    (y.square().sum() + loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    counts = torch.stack([moe.expert_counts for moe in moes])
    rows = torch.stack([moe.num_rows for moe in moes])
    return {"y": y, "loss": loss, "x": x.grad, "counts": counts, "rows": rows, **gradients}


def assert_compiles_once(model: nn.Module, sizes, mark=torch._dynamo.mark_dynamic) -> None:
    """Whole, forward and backward, with the results of eager, for all these numbers of tokens.

    The default backend takes the same graphs; compiling its C++ would take most of the suite.
    """
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for num_tokens in sizes:
        x = tokens(num_tokens)
        mark(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=num_tokens != sizes[0]):
            actual = step(model, compiled, x)
        for name, expected in step(model, model, tokens(num_tokens)).items():
            torch.testing.assert_close(actual[name], expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("score", SCORES)
def test_every_router_compiles_whole_and_once_for_all_token_counts(score):
    layers = [
        layer(**SCORES[score], router=router, capacity_factor=capacity_factor)
        for router in ("full", "partitioned")
        for capacity_factor in (None, 0.7)
    ]
    assert_compiles_once(nn.Sequential(*layers), [7, 12, 64])


@pytest.mark.parametrize("settings", [DEEPSEEK, GPT_OSS], ids=["deepseek v3", "gpt-oss"])
def test_a_published_layer_compiles_whole_and_once_for_all_token_counts(settings):
    assert_compiles_once(layer(**settings), [7, 12, 64])


def test_one_token_and_none_need_no_compilation_of_their_own():
    # torch specialises on sizes 0 and 1, dynamic or not, unless they are marked as unknown.
    moe = layer(**DEEPSEEK, capacity_factor=0.7)
    assert_compiles_once(moe, [7, 1, 0, 64], mark=mark_unbacked)


def test_a_step_of_the_selection_bias_needs_no_new_compilation():
    moe = layer(**DEEPSEEK)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(tokens(64))
    before = moe.statistics().load
    for _ in range(5):
        update_biases(moe)
        moe.reset_statistics()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(tokens(64))
    assert moe.load_balancer.counts.sum() == 2 * 64
    assert moe.statistics().load != before


def test_a_checkpoint_compiles_with_the_layer_and_counts_once():
    moe = layer(**DEEPSEEK)

    def forward(x):
        return checkpoint(moe, x, use_reentrant=False)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        actual = step(moe, compiled, tokens(7))
    for name, expected in step(moe, moe, tokens(7)).items():
        assert torch.equal(actual[name], expected), name


@pytest.mark.parametrize("settings", [DEEPSEEK, GPT_OSS], ids=["deepseek v3", "gpt-oss"])
def test_an_exported_layer_computes_the_same_for_any_number_of_tokens(settings):
    moe = layer(**settings, capacity_factor=0.7)
    sizes = ({0: torch.export.Dim("num_tokens", min=0)},)
    program = torch.export.export(moe, (tokens(7),), dynamic_shapes=sizes).module()
    for num_tokens in (7, 64, 1, 0):
        assert torch.equal(program(tokens(num_tokens)), moe(tokens(num_tokens)))


def test_an_exported_layer_counts_nothing():
    moe, x = layer(bias_update_rate=0.05), tokens(7)
    moe(x)
    loss, statistics = moe.auxiliary_loss, moe.statistics()
    program = torch.export.export(moe, (x,))
    assert program.run_decompositions().graph_signature.buffers_to_mutate == {}
    program.module()(x)
    assert moe.auxiliary_loss is loss
    assert moe.statistics() == statistics
