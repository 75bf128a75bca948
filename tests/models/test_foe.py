# SPDX-License-Identifier: Apache-2.0
"""The Federation of Experts on one device, against its equations written out group by group."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fomoe.models import Decoder, DecoderConfig, FoE, FoEConfig, load_model, save_model
from fomoe.models.attention import rotate, rotation
from fomoe.nn import auxiliary_loss, initialize, model_tensors, named_tensors

CONFIG = FoEConfig(
    vocab_size=50,
    dim=24,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    expert_dim=10,
    num_experts=16,
    top_k=8,
    tie_embeddings=False,
)
TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(3))


def foe(**changes):
    model = FoE(replace(CONFIG, **changes)).double()
    initialize(model, seed=1)
    return model


def normed(x, weight, epsilon=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


class ByHand:
    """Section 3.1 of the paper: loops over groups, tokens and experts, no op of ours but rotate."""

    def __init__(self, model):
        self.config, self.w = model.config, dict(named_tensors(model))

    def logits(self, tokens):
        config, w = self.config, self.w
        x = w["embedding.weight"][tokens]
        if config.norm == "peri":
            x = normed(x, w["embedding_norm.weight"])
        streams = [x] * config.num_groups
        for layer in range(config.num_layers):
            streams = self.layer(f"layers.{layer}.", streams, is_first=layer == 0)
        x = normed(sum(streams) / config.num_groups, w["norm.weight"])
        return x @ w["unembedding.weight"].T

    def layer(self, at, streams, is_first):
        config, w = self.config, self.w
        added = [
            self.attention(f"{at}attention.{h}.", normed(x, w[at + "attention_norm.weight"]))
            for h, x in enumerate(streams)
        ]
        out = (lambda y, name: normed(y, w[at + name])) if config.norm == "peri" else lambda y, _: y
        scale = config.residual_scale
        if is_first:  # one attention with all heads
            r = streams[0] + scale * out(sum(added), "attention_output_norm.weight")
        else:
            steps = [
                x + scale * out(y, "attention_output_norm.weight")
                for x, y in zip(streams, added, strict=True)
            ]
            r = sum(steps) / config.num_groups
        u = normed(r, w[at + "moe_norm.weight"])
        experts = self.experts(at + "moe.", u)
        return [r + scale * out(y, "moe_output_norm.weight") for y in experts]

    def attention(self, at, x):
        config = self.config
        positions = rotation(x.shape[1], config.head_dim, 1e4, dtype=torch.float64, device=x.device)
        key, value = x @ self.w[at + "key"].T, x @ self.w[at + "value"].T
        past = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        heads = []
        for query_rows in self.w[at + "query"].split(config.head_dim):
            query = rotate(x @ query_rows.T, positions)
            scores = query @ rotate(key, positions).mT / math.sqrt(config.head_dim)
            heads.append(scores.masked_fill(~past, -math.inf).softmax(-1) @ value)
        return torch.cat(heads, -1) @ self.w[at + "output"].T

    def experts(self, at, x):
        config = self.config
        size, k = config.experts_per_group, config.top_k // config.num_groups
        outputs = [torch.zeros_like(x) for _ in range(config.num_groups)]
        router = torch.stack([self.w[f"{at}router.{e}.weight"] for e in range(config.num_experts)])
        for place in [(b, s) for b in range(x.shape[0]) for s in range(x.shape[1])]:
            logits = router @ x[place]
            groups = logits.split(size)
            if config.score == "sigmoid":
                values = logits.sigmoid()
            elif config.softmax_over == "all":
                values = logits.softmax(0)
            else:
                values = torch.cat([group.softmax(0) for group in groups])
            chosen = [g * size + int(e) for g, y in enumerate(groups) for e in y.topk(k).indices]
            total = sum(values[e] for e in chosen) if config.renormalize else 1.0
            for e in chosen:
                gate, up = (self.w[f"{at}experts.{e}.w1"] @ x[place]).chunk(2)
                y = self.w[f"{at}experts.{e}.w2"] @ (F.silu(gate) * up)
                outputs[e // size][place] += config.scale * values[e] / total * y
        return outputs


VARIANTS = [
    {},
    {"softmax_over": "all"},
    {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    {"renormalize": True, "top_k": 4, "softmax_over": "all"},
    {"norm": "peri", "residual_scale": 0.5},
    {"num_kv_heads": 1, "top_k": 3},
    {"num_kv_heads": 8, "num_layers": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_and_gradients_are_those_of_the_equations(changes):
    model = foe(**changes)
    logits = model(TOKENS)
    expected = ByHand(model).logits(TOKENS)  # of detached weights
    assert torch.allclose(logits, expected, rtol=0, atol=1e-10)

    model(TOKENS).square().sum().backward()
    by_hand = ByHand(model)
    leaves = {name: value.clone().requires_grad_() for name, value in by_hand.w.items()}
    by_hand.w = leaves
    by_hand.logits(TOKENS).square().sum().backward()
    for (name, _), gradient in zip(named_tensors(model), gradients(model), strict=True):
        expected = leaves[name].grad
        expected = torch.zeros_like(gradient) if expected is None else expected
        assert torch.allclose(gradient, expected, rtol=1e-8, atol=1e-8), name


def gradients(model):
    for tensor in model_tensors(model):
        yield tensor.of(tensor.parameter.grad)


def test_one_group_is_a_decoder_but_for_the_first_streams():
    """H = 1: nothing is shared out, and the equations are those of an ordinary decoder."""
    model = foe(num_kv_heads=1, num_heads=4, top_k=4)
    shape = {
        "num_kv_heads": 1, "num_heads": 4, "top_k": 4, "vocab_size": 50, "dim": 24,
        "num_layers": 3, "head_dim": 6, "expert_dim": 10, "num_experts": 16,
        "tie_embeddings": False,
    }  # fmt: skip
    decoder = Decoder(DecoderConfig(**shape)).double()
    ours = {
        name.replace("attention.0.", "attention.") + ".weight" * ("attention.0." in name): value
        for name, value in named_tensors(model)
    }
    with torch.no_grad():
        for name, value in named_tensors(decoder):
            value.copy_(ours.pop(name))
    assert not ours
    assert torch.allclose(model(TOKENS), decoder(TOKENS), rtol=0, atol=1e-12)


def test_the_auxiliary_loss_is_the_mean_of_the_groups_own():
    model = foe(num_layers=1, balance_loss_coefficient=0.5, z_loss_coefficient=0.25)
    seen = []
    moe = model.layers[0].moe
    moe.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(TOKENS)
    logits = seen[0].reshape(-1, 24) @ moe.router.weight.detach().T
    losses = []
    for group in logits.split(4, dim=1):
        probabilities, load = group.softmax(1), torch.zeros(4, dtype=torch.float64)
        for token in group.topk(2).indices:
            load[token] += 1 / (2 * len(group))
        balance = 4 * (load * probabilities.mean(0)).sum()
        z = group.logsumexp(1).square().mean()
        losses.append(0.5 * balance + 0.25 * z)
    assert torch.allclose(auxiliary_loss(model), torch.stack(losses).mean(), atol=1e-12)


def test_every_group_gets_its_part_of_every_tokens_choices():
    model = foe()
    model(TOKENS)
    statistics = model.layers[1].moe.statistics()
    assert statistics.num_choices == TOKENS.numel() * 8
    load = torch.tensor(statistics.load).view(4, 4).sum(1)
    assert torch.allclose(load, torch.full((4,), 0.25))
    assert statistics.ghost_share == 0


def test_a_site_with_some_experts_skips_the_others_and_starts_with_the_same_weights():
    residents = [(0, 3, 9), (), tuple(range(16))]
    site, whole = FoE(CONFIG, residents).double(), foe()
    initialize(site, seed=1)
    values = dict(named_tensors(whole))
    for name, value in named_tensors(site):
        assert torch.equal(value, values[name]), name
    with torch.no_grad():
        for layer, held in enumerate(residents):
            for expert in set(range(16)) - set(held):
                values[f"layers.{layer}.moe.experts.{expert}.w2"].zero_()
    assert torch.allclose(site(TOKENS), whole(TOKENS), rtol=0, atol=1e-12)
    assert site.layers[1].moe.statistics().ghost_share == 1


@torch.no_grad()
def test_cached_tokens_give_the_logits_of_all_at_once():
    model = foe().eval()
    cache = model.new_cache(2, 7)
    parts = [(TOKENS[:, :4], [4, 4]), (TOKENS[:, 4:5], [1, 1]), (TOKENS[:, 5:], [2, 2])]
    logits = [model.unembed(model.hidden(t, cache.step(n))) for t, n in parts]
    assert torch.allclose(torch.cat(logits, 1), model(TOKENS), rtol=0, atol=1e-12)


def test_checkpointed_layers_give_the_same_gradients():
    plain, saving = foe(), foe()
    saving.gradient_checkpointing = True
    for model in (plain, saving):
        (model(TOKENS).square().sum() + auxiliary_loss(model)).backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_bfloat16_by_autocast_stays_near():
    model = foe().float()
    expected = model(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(TOKENS)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_a_model_file_gives_an_equal_model(tmp_path):
    model = foe()
    save_model(model, tmp_path)
    read = load_model(tmp_path)
    assert isinstance(read, FoE)
    assert read.config == CONFIG
    assert torch.equal(read(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 18}, "num_experts: expected a multiple of the num_kv_heads = 4 groups"),
        ({"top_k": 6}, "top_k: expected a multiple of the num_kv_heads = 4 groups, got 6"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 8, got 3"),
        ({"score": "unit"}, "score: expected softmax or sigmoid, got 'unit'"),
        ({"score": "sigmoid", "softmax_over": "all"}, "softmax_over: expected 'group'"),
        ({"softmax_over": "some"}, "softmax_over: expected one of group, all, got 'some'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_residents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected one for each of 3 layers, got 1"):
        FoE(CONFIG, [(0,)])
    with pytest.raises(ValueError, match=r"layer 1: resident_experts\[0\]"):
        FoE(CONFIG, [(0,), (16,), ()])
