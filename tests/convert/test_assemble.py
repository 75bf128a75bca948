# SPDX-License-Identifier: Apache-2.0
"""The converted model computes what the dense one does, less what was not chosen."""

import pytest
import torch
import torch.nn.functional as F

from fomoe.convert.methods import METHODS
from fomoe.convert.router import Choice
from fomoe.models.pretrained import load_dense
from fomoe.nn import MoE, auxiliary_loss

from .random_results import convert, random_results

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = torch.arange(40).view(2, 20) * 7 % 256


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("method", ["dot", "core", "prune"])
def test_with_every_expert_active_the_logits_are_those_of_the_dense_model(
    sources, family, dtype, tolerance, method
):
    dense, _ = load_dense(sources[family], dtype=dtype)
    model = convert(dense, random_results(dense, 6), method=method, active_share=1.0)
    with torch.no_grad():
        difference = (model(TOKENS) - dense(TOKENS)).abs().max()
    assert difference <= tolerance
    assert sum(isinstance(module, MoE) for module in model.modules()) == 3 * (method != "prune")


@pytest.mark.parametrize("method", ["dot", "core", "prune"])
def test_with_some_active_the_layer_is_the_dense_one_with_the_others_masked(sources, method):
    dense, _ = load_dense(sources["llama"])
    results = random_results(dense, 6)
    model = convert(dense, results, method=method, active_share=0.5)
    x = torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense_block = dense.layers[1].feed_forward
    gate, up = F.linear(x, dense_block.w1).chunk(2, dim=1)
    logits = F.linear(x.float(), results[1].router.weight, results[1].router.bias)
    if method == "prune":
        chosen = torch.zeros(50, 6).index_fill_(1, torch.arange(3), 1)
    else:
        chosen = Choice(3, METHODS[method].always_on)(logits)
    hidden = F.silu(gate) * up * chosen[:, results[1].expert]
    block = model.layers[1].moe or model.layers[1].feed_forward
    torch.testing.assert_close(block(x), F.linear(hidden, dense_block.w2))


def test_layers_that_are_not_converted_stay_dense_and_are_not_copied(sources):
    dense, _ = load_dense(sources["llama"])
    model = convert(dense, random_results(dense, 6, layers=(1,)), layers=(1,), active_share=1.0)
    assert model.layers[0].feed_forward is dense.layers[0].feed_forward
    assert model.layers[1].feed_forward is None
    torch.testing.assert_close(model(TOKENS), dense(TOKENS))


@pytest.mark.parametrize("method", ["dot", "core"])
def test_training_the_model_leaves_its_routers_alone(sources, method):
    dense, _ = load_dense(sources["llama"], dtype=torch.float32)
    model = convert(dense, random_results(dense, 6), method=method, active_share=0.5)
    model.requires_grad_()
    loss = F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
    (loss + auxiliary_loss(model)).backward()
    for name, parameter in model.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.any())
        assert trained == (".router." not in name), name
