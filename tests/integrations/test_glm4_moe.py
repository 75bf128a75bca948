# SPDX-License-Identifier: Apache-2.0
"""A converted decoder as GLM-4-MoE: nearly the same function, read by transformers alone.

Tolerance: gates within EPSILON / 2 times the spread of the chosen logits; of all positions half
within 2e-3 and 95% within 0.02 of logits whose standard deviation is 1. What is farther off is
where two experts' biased logits differ by less than float32 shows.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeForCausalLM

from fomoe.errors import UserError
from fomoe.integrations.transformers import export_huggingface
from fomoe.integrations.transformers.glm4_moe import EPSILON, glm4_moe
from fomoe.models import Decoder, RopeScaling, configuration
from fomoe.nn import initialize

CONVERTED = replace(
    configuration("tiny"), num_layers=3, activation="swiglu", score="unit", router_bias=True,
    norm="pre",
)  # fmt: skip
LLAMA3 = RopeScaling(
    kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
    original_context=32,
)  # fmt: skip
VARIANTS = {
    "as converted": {},
    "with a core, a dense layer and Qwen's attention": {
        "shared_expert_dim": 128, "dense_layers": (0,), "dense_dim": 24, "qkv_bias": True,
        "head_norm": True, "tie_embeddings": False,
    },
    "scaled": {"scale": 0.5, "rope_theta": 500.0, "rope_scaling": LLAMA3, "router_bias": False},
    "stretched": {"rope_scaling": RopeScaling(kind="linear", factor=3.0)},
}  # fmt: skip


def decoder(**changes):
    model = Decoder(replace(CONVERTED, **changes)).eval()
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=generator)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_nearly_equal_after_a_trip_through_a_folder(variant, tmp_path):
    model = decoder(**VARIANTS[variant])
    export_huggingface(model, tmp_path / "glm", {}, "glm4-moe")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "glm", trust_remote_code=False)
    assert type(theirs) is Glm4MoeForCausalLM
    tokens = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert logits.std() == pytest.approx(1.0, abs=0.1)
    difference = (theirs(tokens).logits - logits).abs().amax(-1).flatten()
    median, most = difference.quantile(torch.tensor([0.5, 0.95]))
    assert median < 2e-3
    assert most < 0.02
    generated = theirs.generate(tokens[:2], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 67)


def test_gates_are_one_within_the_stated_tolerance():
    model = decoder()
    block = model.layers[0].moe
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    _, gates, chosen = glm4_moe(model).model.layers[0].mlp.gate(x)
    logits = block.router.weight @ x.T
    biased = (logits + block.router.bias[:, None]).T
    assert torch.equal(chosen.sort().values, biased.topk(4).indices.sort().values)
    of_chosen = logits.T.gather(1, chosen)
    spread = (of_chosen - of_chosen.mean(1, keepdim=True)).abs()
    assert ((gates - 1).abs() <= EPSILON / 2 * spread + 1e-5).all()
    assert (gates - 1).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "sigmoid"}, "glm4-moe: score: expected 'unit', got 'sigmoid'"),
        ({"norm": "peri"}, "glm4-moe: norm: expected 'pre', got 'peri'"),
        ({"sliding_window": 8}, "glm4-moe: sliding_window: expected 0, got 8"),
        ({"shared_expert_dim": 65}, "shared_expert_dim: expected a multiple of expert_dim = 64"),
        (
            {"dense_layers": (1,), "dense_dim": 8},
            r"expected the first layers and not all of them, got \(1,\)",
        ),
        (
            {"dense_layers": (0, 1, 2), "dense_dim": 8},
            r"expected the first layers and not all of them, got \(0, 1, 2\)",
        ),
    ],
)
def test_a_setting_that_glm_4_has_not_is_refused_and_leaves_nothing(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_huggingface(decoder(**changes), tmp_path / "glm", {}, "glm4-moe")
    assert not list(tmp_path.iterdir())
