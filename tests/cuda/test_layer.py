# SPDX-License-Identifier: Apache-2.0
"""The layer on the device: against the CPU, compiled, under autocast."""

import copy

import pytest
import torch
from on_device import ON_BOTH, needs_cuda
from samples import TOLERANCES, name_of

from fomoe import MoE, MoEConfig
from fomoe.nn import initialize

CONFIGS = {
    "softmax": {},
    "deepseek v3": {
        "score": "sigmoid", "renormalize": True, "num_groups": 4, "top_k_groups": 2,
        "group_score": "top2_sum", "bias_update_rate": 0.05, "shared_expert_dim": 32,
    },
    "gpt-oss": {"activation": "swiglu_clamped", "score_after_top_k": True, "has_bias": True},
    "two matrices": {"activation": "silu"},
}  # fmt: skip
COMPILED = [
    pytest.param("cpu", "aot_eager", "softmax", id="cpu"),
    *(
        pytest.param("cuda", "aot_eager", name, id=f"cuda-{name}", marks=needs_cuda)
        for name in CONFIGS
    ),
    # The default backend writes kernels around the same graphs, which takes long.
    pytest.param("cuda", "inductor", "deepseek v3", id="cuda-inductor", marks=needs_cuda),
]


def layer(**changes) -> MoE:
    shape = {"dim": 64, "expert_dim": 32, "num_experts": 8, "top_k": 2}
    moe = MoE(MoEConfig(**shape | changes), resident_experts=[0, 2, 3, 5, 6])
    initialize(moe, seed=0)
    return moe


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(50, 64, generator=torch.Generator().manual_seed(seed))


def step(moe, function, x, dtype=torch.float32):
    """Output and gradients, on the CPU."""
    moe.zero_grad()
    x = x.to(dtype).requires_grad_()
    y = function(x)
    (y.float().square().sum() + moe.auxiliary_loss).backward()
    gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
    return {name: t.detach().cpu() for name, t in ({"y": y, "x": x.grad} | gradients).items()}


def assert_equal(actual, expected, tolerance):
    for name, wanted in expected.items():
        size = max(float(wanted.abs().max()), 1e-3)
        message = f"{name} differs"
        torch.testing.assert_close(
            actual[name],
            wanted,
            rtol=tolerance,
            atol=tolerance * size,
            msg=lambda m, n=message: f"{n}: {m}",
        )


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("device", ON_BOTH)
def test_a_training_step_equals_that_of_the_cpu(device, settings):
    torch.set_float32_matmul_precision("highest")
    on_cpu = layer(**CONFIGS[settings])
    on_device = copy.deepcopy(on_cpu).to(device)
    expected = step(on_cpu, on_cpu, tokens())
    assert_equal(step(on_device, on_device, tokens().to(device)), expected, 5e-5)
    assert torch.equal(on_device.expert_counts.cpu(), on_cpu.expert_counts)


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_gives_what_tensors_of_its_dtype_give(device, dtype):
    moe = layer().to(device)
    x = tokens().to(device)
    with torch.autocast(device, dtype=dtype):
        y = moe(x)
    assert y.dtype == dtype
    expected = moe(x.to(dtype).float()).detach()
    size = float(expected.abs().max())
    difference = float((y.detach().float() - expected).abs().max())
    assert difference <= 16 * TOLERANCES[dtype] * size


@pytest.mark.parametrize(("device", "backend", "settings"), COMPILED)
def test_the_layer_compiles_whole(device, backend, settings):
    torch._dynamo.reset()
    moe = layer(**CONFIGS[settings]).to(device)
    compiled = torch.compile(moe, fullgraph=True, backend=backend, dynamic=True)
    for seed in range(2):
        x = tokens(seed).to(device)
        assert_equal(step(moe, compiled, x.clone()), step(moe, moe, x.clone()), 5e-5)
