# SPDX-License-Identifier: Apache-2.0
"""The executable paper where things change on the way: experts, who takes part, what travels."""

import math
from dataclasses import replace

import pytest
import torch
from nano_example import TINY, assert_same_bits, batches, expert_of, nano

# --- experts that move ----------------------------------------------------------------------------

STEADY = replace(TINY, placement="random", rounds=2, local_steps=3, warmup=0, min_ratio=1.0)


def residents(config, t):
    """(site, layer, expert) of every expert that a site holds in round t."""
    return {(s, *e) for e, sites in nano.placement(config, t).items() for s in sites}


def arrivals(config):
    """Those that a site holds in the second round only."""
    return residents(config, 1) - residents(config, 0)


def test_what_a_site_fetches_starts_adamw_anew_and_what_it_keeps_goes_on():
    config = replace(STEADY, rounds=3)
    run = nano.train(config, batches)
    first, second, third = (residents(config, t) for t in range(3))
    assert first & third - second  # some leave and come back
    for site, (_, state) in enumerate(run.sites):
        for name, adamw in state.items():
            here = site, *(expert_of(name) or ())
            is_expert = expert_of(name) is not None
            rounds = 1 if here not in second else 2 if here not in first else 3
            assert adamw["step"] == 3 * (rounds if is_expert else 3), name


def test_outer_momentum_goes_where_the_expert_goes():
    one, two = (nano.train(replace(STEADY, rounds=rounds), batches) for rounds in (1, 2))
    for _, layer, expert in arrivals(STEADY):
        name = f"layers.{layer}.moe.experts.{expert}.w1"
        before, after = one.momenta[name], two.momenta[name]
        delta = after - 0.9 * before
        step = (delta + 0.9 * after) * 0.7
        torch.testing.assert_close(one.parameters[name] - two.parameters[name], step)
        assert (before.norm() / after.norm()) > 0.1  # it would be missed


def test_moved_experts_warm_up_by_themselves():
    config = replace(STEADY, overlap=1, outer="average")
    before = nano.train(replace(config, rounds=1), batches).parameters
    after = nano.train(replace(config, moved_warmup_steps=10**9), batches).parameters
    fetched = {(layer, expert) for _, layer, expert in arrivals(config)}
    assert 0 < len(fetched) < 8
    for name in before:
        # AdamW moves an element by about the learning rate, here 1e-2 or a billionth of it.
        rests = (after[name] - before[name]).abs().max() < 1e-6
        assert rests == (expert_of(name) in fetched), name


def test_placement_is_drawn_again_every_so_many_rounds():
    config = replace(TINY, placement="random", shuffle_every=2, full_replica_rounds=1)
    tables = [nano.placement(config, t) for t in range(6)]
    assert set(tables[0].values()) == {(0, 1, 2, 3)}
    assert tables[1] == tables[2] != tables[3] == tables[4] != tables[5]
    assert tables[1] == nano.placement(replace(config, full_replica_rounds=0), 0)


# --- sites that fail ------------------------------------------------------------------------------


class Fragile(nano.Model):
    """Token 255 at the start makes the loss NaN, token 254 the gradient."""

    def forward(self, tokens):
        logits = super().forward(tokens)
        if tokens[0, 0] == 255:
            return logits * math.nan
        if tokens[0, 0] == 254:
            return logits + (self.norm.weight[0] * 0).sqrt()
        return logits


def poisoned(sick, token, steps=range(100)):
    def draw(site, step):
        batch = batches(site, step, sequences=site + 1)
        batch[0, 0] = token if site == sick and step in steps else 0
        return batch

    return draw


@pytest.mark.parametrize("token", [255, 254], ids=["loss", "gradient"])
@pytest.mark.parametrize("strategy", ["ddp", "diloco"])
def test_others_go_on_without_a_site_that_fails(strategy, token):
    config = replace(TINY, strategy=strategy, sites=3)
    run = nano.train(config, poisoned(2, token), Fragile)
    alone = nano.train(replace(config, sites=2), poisoned(2, token), Fragile)
    assert run.rejected == [(2,)] * 3
    assert alone.rejected == [()] * 3
    assert_same_bits(run.parameters, alone.parameters)
    assert_same_bits(run.momenta, alone.momenta)
    for model, _ in run.sites:
        assert_same_bits(dict(nano.tensors(model)), run.parameters)


@pytest.mark.parametrize("outer", ["nesterov", "average", "local_adamw"])
def test_an_expert_that_nobody_trained_rests(outer):
    config = replace(TINY, sites=2, overlap=1, outer=outer)
    run = nano.train(config, poisoned(1, 255), Fragile)
    start = dict(nano.tensors(nano.initialize(nano.Model(config), config.seed)))
    placement = nano.placement(config)
    for name, tensor in run.parameters.items():
        rests = placement.get(expert_of(name)) == (1,)
        assert torch.equal(tensor, start[name]) == rests, name
        if outer == "nesterov":
            assert (name not in run.momenta) == rests


def test_a_site_that_failed_begins_anew_with_adamw():
    config = replace(TINY, rounds=2)
    run = nano.train(config, poisoned(1, 254, steps=range(2)), Fragile)
    assert run.rejected == [(1,), ()]
    for site, (_, state) in enumerate(run.sites):
        for name, adamw in state.items():
            assert adamw["step"] == (2 if site == 1 else 4), name
            assert adamw["exp_avg"].isfinite().all()


def test_when_all_sites_fail_the_run_ends():
    with pytest.raises(AssertionError, match="no site is left"):
        nano.train(replace(TINY, sites=1, overlap=1), poisoned(0, 255), Fragile)


# --- codecs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "outer", "tolerance"),
    [("bf16", "average", 0.02), ("int8", "nesterov", 0.02), ("int4", "nesterov", 0.3)],
)
def test_a_codec_changes_little_and_holders_agree(codec, outer, tolerance):
    config = replace(TINY, outer=outer, placement="random")
    exact, run = nano.train(config, batches), nano.train(replace(config, codec=codec), batches)
    start = dict(nano.tensors(nano.initialize(nano.Model(config), config.seed)))
    name = "embedding.weight"
    error = (run.parameters[name] - exact.parameters[name]).norm()
    assert 0 < error < tolerance * (exact.parameters[name] - start[name]).norm()
    for model, _ in run.sites:
        views = dict(nano.tensors(model))
        assert_same_bits(views, {name: run.parameters[name] for name in views})
