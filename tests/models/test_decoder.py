# SPDX-License-Identifier: Apache-2.0
"""The decoder's structure: names, norms, residuals, residency, and that it learns."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fomoe.models import Decoder, DecoderConfig, FeedForward, RopeScaling, configuration
from fomoe.models.attention import rotation
from fomoe.models.normalization import RMSNorm
from fomoe.nn import auxiliary_loss, initialize

CONFIG = DecoderConfig(
    vocab_size=11,
    dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    expert_dim=6,
    num_experts=4,
    top_k=2,
)


def decoder(resident_experts=None, **changes) -> Decoder:
    model = Decoder(replace(CONFIG, **changes), resident_experts).double()
    initialize(model, seed=0)
    return model


def tokens(batch=2, length=7):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0))


LAYER = [
    "attention_norm.weight",
    "attention.query.weight",
    "attention.key.weight",
    "attention.value.weight",
    "attention.output.weight",
    "moe_norm.weight",
    "moe.router.weight",
    "moe.experts.w1",
    "moe.experts.w2",
]


def test_parameter_names_of_a_pre_norm_model_in_order():
    names = list(decoder(tie_embeddings=False).state_dict())
    assert names == [
        "embedding.weight",
        *(f"layers.0.{name}" for name in LAYER),
        *(f"layers.1.{name}" for name in LAYER),
        "norm.weight",
        "unembedding.weight",
    ]


def test_parameter_names_of_a_peri_norm_model_in_order():
    layer = LAYER.copy()
    layer.insert(5, "attention_output_norm.weight")
    layer.append("moe_output_norm.weight")
    names = [name for name, _ in decoder(norm="peri").named_parameters()]
    assert names == [
        "embedding.weight",
        "embedding_norm.weight",
        *(f"layers.0.{name}" for name in layer),
        *(f"layers.1.{name}" for name in layer),
        "norm.weight",
    ]


def test_a_dense_layer_has_a_feed_forward_in_place_of_experts():
    model = decoder(dense_layers=(0,), dense_dim=5)
    names = [name for name, _ in model.named_parameters()]
    dense = [*LAYER[:6], "feed_forward.w1", "feed_forward.w2"]
    assert names[1:-1] == [
        *(f"layers.0.{name}" for name in dense),
        *(f"layers.1.{name}" for name in LAYER),
    ]
    assert model.layers[0].moe is None
    assert model.layers[1].feed_forward is None
    assert model.layers[0].feed_forward.w1.shape == (10, 8)


def test_a_feed_forward_is_the_written_out_swiglu():
    block = FeedForward(dim=2, width=2)
    with torch.no_grad():
        block.w1.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]))
        block.w2.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    # Gates (1, -1), ups (2, -3): hidden (2 silu(1), -3 silu(-1)).
    first, second = 2 * F.silu(torch.tensor(1.0)), -3 * F.silu(torch.tensor(-1.0))
    torch.testing.assert_close(
        block(torch.tensor([1.0, -1.0])), torch.stack([first + second, second])
    )


def test_residents_are_given_for_the_layers_that_have_experts():
    model = decoder([[0, 3], [1]], num_layers=3, dense_layers=(1,), dense_dim=5)
    assert model.layers[0].moe.experts.expert_ids == (0, 3)
    assert model.layers[2].moe.experts.expert_ids == (1,)
    with pytest.raises(ValueError, match="one for each of 2 layers, got 3"):
        decoder([[0]] * 3, num_layers=3, dense_layers=(1,), dense_dim=5)
    with pytest.raises(ValueError, match="layer 2: resident_experts"):
        decoder([[0], [4]], num_layers=3, dense_layers=(1,), dense_dim=5)


def test_a_dense_model_has_no_auxiliary_loss():
    model = decoder(dense_layers=(0, 1), dense_dim=5)
    assert model(tokens()).shape == (2, 7, 11)
    assert auxiliary_loss(model) == 0


def test_a_configuration_comes_back_from_json():
    config = replace(
        CONFIG, dense_layers=(1,), dense_dim=5, router_bias=True, capacity_factor=1.5,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )  # fmt: skip
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DecoderConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_shapes_follow_the_heads_and_the_residents():
    model = decoder([[0, 3], [1]])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["layers.0.attention.query.weight"] == (8, 8)
    assert shapes["layers.0.attention.key.weight"] == (4, 8)
    assert shapes["layers.0.attention.output.weight"] == (8, 8)
    assert shapes["layers.0.moe.router.weight"] == (4, 8)
    assert shapes["layers.0.moe.experts.w1"] == (2, 12, 8)
    assert shapes["layers.1.moe.experts.w2"] == (1, 8, 6)
    assert model.layers[1].moe.experts.expert_ids == (1,)


def test_rms_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(2, epsilon=0.0)
    torch.nn.init.constant_(norm.weight, 10.0)
    # The root mean square of (1, 7) is 5.
    assert norm(torch.tensor([1.0, 7.0])).tolist() == pytest.approx([2.0, 14.0])


def test_rms_norm_of_bf16_is_the_rounded_float32_one():
    norm, x = RMSNorm(64, epsilon=1e-6), torch.randn(8, 64).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


@pytest.mark.parametrize("norm", ["pre", "peri"])
def test_the_forward_is_the_written_out_residual_stream(norm):
    model = decoder(norm=norm, residual_scale=0.25)
    batch = tokens()
    positions = rotation(7, 4, 10000.0, dtype=torch.float64, device=batch.device)

    x = model.embedding.weight[batch]
    if norm == "peri":
        x = model.embedding_norm(x)
    for layer in model.layers:
        added = layer.attention(layer.attention_norm(x), positions)
        x = x + 0.25 * (layer.attention_output_norm(added) if norm == "peri" else added)
        added = layer.moe(layer.moe_norm(x))
        x = x + 0.25 * (layer.moe_output_norm(added) if norm == "peri" else added)
    expected = model.norm(x) @ model.embedding.weight.T

    torch.testing.assert_close(model(batch), expected)


def test_untied_models_have_an_unembedding_of_their_own():
    model = decoder(tie_embeddings=False)
    torch.nn.init.zeros_(model.unembedding.weight)
    assert torch.equal(model(tokens()), torch.zeros(2, 7, 11, dtype=torch.float64))


def test_no_position_sees_a_later_one():
    model, batch = decoder(), tokens()
    changed = batch.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :4], model(batch)[:, :4])
    assert not torch.allclose(model(changed)[:, 4:], model(batch)[:, 4:])


def test_a_site_with_every_expert_is_the_full_model():
    model, site = decoder(), decoder([range(4)] * 2)
    assert torch.equal(site(tokens()), model(tokens()))


def test_a_site_skips_the_experts_it_does_not_hold():
    model, site = decoder(), decoder([[0, 3], [1]])
    muted = copy.deepcopy(model)
    with torch.no_grad():
        muted.layers[0].moe.experts.w2[[1, 2]] = 0
        muted.layers[1].moe.experts.w2[[0, 2, 3]] = 0
    torch.testing.assert_close(site(tokens()), muted(tokens()))
    assert not torch.allclose(site(tokens()), model(tokens()))


@pytest.mark.parametrize("name", ["tiny", "small-swiglu"])
def test_a_named_model_learns_a_repeated_sequence(name):
    config = replace(configuration(name), dim=32, num_layers=2, num_experts=4, expert_dim=16)
    model = Decoder(replace(config, top_k=2))
    initialize(model, seed=0)
    batch = torch.arange(17).repeat(2, 1) * 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    losses = []
    for _ in range(15):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + auxiliary_loss(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.0
    assert losses[-1] < 1.0


def test_autocast_keeps_the_residual_stream_in_float32():
    model = decoder(norm="peri").float()
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    assert streams == [torch.float32, torch.float32]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(tokens()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_an_empty_batch_gives_empty_logits(shape):
    assert decoder()(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 11)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, dtype=torch.int64)])
def test_input_that_is_not_a_batch_of_tokens_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"expected tokens of shape \(B, S\) and dtype torch.int64"
    ):
        decoder()(wrong)


def test_residents_must_be_given_for_every_layer():
    with pytest.raises(ValueError, match="one for each of 2 layers, got 1"):
        decoder([[0]])


def test_residents_that_do_not_fit_name_their_layer():
    with pytest.raises(ValueError, match=r"layer 1: resident_experts\[0\]: expected an id in"):
        decoder([[0], [4]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected an integer of at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 2, got 3"),
        ({"head_dim": 5}, "head_dim: expected an even number, got 5"),
        ({"norm": "post"}, "norm: expected one of pre, peri, got 'post'"),
        ({"tie_embeddings": "no"}, "tie_embeddings: expected true or false, got 'no'"),
        ({"residual_scale": 0}, "residual_scale: expected a finite number above 0, got 0"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a finite number above 0, got inf"),
        ({"top_k": 5}, "top_k: expected at most num_experts = 4, got 5"),
        ({"head_norm": 1}, "head_norm: expected true or false, got 1"),
        ({"sliding_window": -1}, "sliding_window: expected an integer of at least 0, got -1"),
        ({"rope_scaling": 2.0}, "rope_scaling: expected a RopeScaling, got 2.0"),
        ({"dense_layers": (2,), "dense_dim": 5}, r"ascending layers in \[0, 2\), got \(2,\)"),
        ({"dense_layers": (1, 0), "dense_dim": 5}, r"ascending layers in \[0, 2\), got \(1, 0\)"),
        ({"dense_layers": (0,)}, "dense_dim: expected at least 1, got 0"),
        ({"dense_dim": 5}, "dense_dim: expected 0, as there are no dense_layers, got 5"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
