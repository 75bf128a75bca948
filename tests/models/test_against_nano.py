# SPDX-License-Identifier: Apache-2.0
"""fomoe.models.Decoder and the model of examples/nano_fomoe.py are the same function.

Tolerance: logits within 1e-5, gradients within 1e-5 of the largest entry (fp32, other order of
operations); initial values equal to the bit.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from fomoe.models import Decoder, DecoderConfig
from fomoe.nn import MoE, MoEConfig, auxiliary_loss, initialize, named_tensors
from fomoe.nn.naming import expert_tensor_name


@pytest.fixture(scope="module")
def nano():
    path = Path(__file__).parents[2] / "examples" / "nano_fomoe.py"
    spec = importlib.util.spec_from_file_location("nano_fomoe_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def both(nano, resident):
    c = nano.Config(dim=32, num_layers=2, num_heads=4, num_experts=8, top_k=2,
                    expert_dim=16, strategy="fomoe")  # fmt: skip
    config = DecoderConfig(
        vocab_size=256, dim=c.dim, num_layers=c.num_layers, num_heads=c.num_heads,
        num_kv_heads=c.num_heads, head_dim=c.dim // c.num_heads, expert_dim=c.expert_dim,
        num_experts=c.num_experts, top_k=c.top_k, activation="silu", score="sigmoid", norm="peri",
        balance_loss_coefficient=c.balance_loss_coefficient,
        z_loss_coefficient=c.z_loss_coefficient,
    )  # fmt: skip
    ours = Decoder(config, resident)
    initialize(ours, seed=3)
    theirs = nano.initialize(nano.Model(c, resident), 3)
    return ours, theirs


@pytest.mark.parametrize("resident", [None, ((0, 3, 5), (1, 2, 6))], ids=["all", "ghosts"])
def test_decoder_and_nano_agree(nano, resident):
    ours, theirs = both(nano, resident)
    expected = dict(theirs.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(expected)
    for name, value in ours.named_parameters():
        assert torch.equal(value, expected[name]), name

    tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))
    logits, target = ours(tokens[:, :-1]), theirs(tokens[:, :-1])
    torch.testing.assert_close(logits, target, rtol=0, atol=1e-5)

    labels = tokens[:, 1:].flatten()
    auxiliary = sum(m.auxiliary_loss for m in theirs.modules() if hasattr(m, "auxiliary_loss"))
    torch.testing.assert_close(auxiliary_loss(ours), auxiliary, rtol=1e-6, atol=0)
    (cross_entropy(logits.flatten(0, 1), labels) + auxiliary_loss(ours)).backward()
    (cross_entropy(target.flatten(0, 1), labels) + auxiliary).backward()
    for name, parameter in ours.named_parameters():
        scale = expected[name].grad.abs().max()
        difference = (parameter.grad - expected[name].grad).abs().max()
        assert difference <= 1e-5 * scale, f"{name}: {difference:.2e} of {scale:.2e}"


@pytest.mark.parametrize("resident", [(0, 3, 5), (6,)], ids=["three", "fewer than top_k"])
def test_a_partitioned_router_and_nanos_agree(nano, resident):
    """Output, loss and gradients; nano keeps only the residents' router rows, the layer all."""
    c = nano.Config(dim=32, num_experts=8, top_k=2, expert_dim=16, router="partitioned")
    ours = MoE(
        MoEConfig(
            dim=c.dim, expert_dim=c.expert_dim, num_experts=c.num_experts, top_k=c.top_k,
            activation="silu", score="sigmoid", router="partitioned",
            balance_loss_coefficient=c.balance_loss_coefficient,
            z_loss_coefficient=c.z_loss_coefficient,
        ),
        resident,
    )  # fmt: skip
    initialize(ours, seed=3)
    theirs = nano.MoE(c, resident)
    rows = list(resident)
    with torch.no_grad():
        theirs.router.weight.copy_(ours.router.weight[rows])
        theirs.experts.w1.copy_(ours.experts.w1)
        theirs.experts.w2.copy_(ours.experts.w2)
    x = torch.randn(2, 33, 32, generator=torch.Generator().manual_seed(0))

    y, target = ours(x), theirs(x)
    torch.testing.assert_close(y, target, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.auxiliary_loss, theirs.auxiliary_loss, rtol=1e-6, atol=0)
    (y.square().sum() + ours.auxiliary_loss).backward()
    (target.square().sum() + theirs.auxiliary_loss).backward()
    for name, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(name).grad
        gradient = gradient[rows] if name == "router.weight" else gradient
        scale = parameter.grad.abs().max()
        assert (gradient - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_tensor_names_agree(nano):
    ours, theirs = both(nano, ((0, 3, 5), (1, 2, 6)))
    names = [name for name, _ in named_tensors(ours)]
    assert "layers.1.moe.experts.6.w2" in names
    assert names == [name for name, _ in nano.tensors(theirs)]
    assert expert_tensor_name("layers.1.moe.experts.w2", 6) == "layers.1.moe.experts.6.w2"
