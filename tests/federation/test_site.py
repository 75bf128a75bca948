# SPDX-License-Identifier: Apache-2.0
"""Rounds of whole sites, in threads: experts that move, sites that fail, settings that agree."""

import dataclasses
import math

import pytest
import torch
from in_process import ThreadTransport, run_sites, train_in_threads
from nano_task import NanoTask, nano, settings

from fomoe.errors import UserError
from fomoe.federation.config import Config, OptimizerConfig
from fomoe.federation.inner_optimizer import InnerOptimizer
from fomoe.federation.placement import placement_of_round
from fomoe.federation.site import Site
from fomoe.nn import ModelTensor

SMALL = nano.Config(
    sites=4, overlap=2, rounds=3, local_steps=2, warmup=2, num_experts=8, top_k=2, dim=16,
    expert_dim=8,
)  # fmt: skip
RANDOM = {"placement": "random", "shuffle_every": 1, "moved_warmup_steps": 3}


def train(tmp_path, config=SMALL, task=None, **federation):
    return train_in_threads(settings(config, tmp_path, **federation), task or NanoTask(config))


def parameters(sites):
    return {tensor.name: tensor.value for site in sites for tensor in site.tensors}


def assert_same(first, second):
    first, second = parameters(first), parameters(second)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


class PoisonedTask(NanoTask):
    """The loss of a site is NaN from a step on; the step is its second of a round."""

    def __init__(self, config, poisoned, step=3):
        super().__init__(config)
        self.poisoned, self.step = poisoned, step

    def batch(self, site, step):
        tokens = super().batch(site, step)
        return -tokens if site in self.poisoned and step == self.step else tokens

    def loss(self, model, tokens):
        loss = super().loss(model, tokens.abs())
        return type(loss)(*(part * math.nan for part in loss)) if (tokens < 0).any() else loss


def test_holders_hold_the_same_after_every_round_wherever_experts_go(tmp_path):
    for site, other in zip(*[iter(train(tmp_path, **RANDOM))] * 2, strict=True):
        common = {t.name: t.value for t in site.tensors}
        for tensor in other.tensors:
            if tensor.name in common:
                assert torch.equal(tensor.value, common[tensor.name]), tensor.name


def test_every_round_trains_where_its_placement_says(tmp_path):
    config = settings(SMALL, tmp_path, **RANDOM, full_replica_rounds=1)
    task = NanoTask(SMALL)

    def work(transport: ThreadTransport):
        site = Site(config, task, transport)
        seen = []
        for _ in range(3):
            site.begin_round()
            seen.append([layer.moe.experts.expert_ids for layer in site.model.layers])
            site.local_step()
            site.end_round()
        return seen

    for site, seen in enumerate(run_sites(4, work)):
        places = [placement_of_round(config, 2, 8, index) for index in range(3)]
        assert seen == [place.residents(site) for place in places]
        assert [len(layers[0]) for layers in seen] == [8, 4, 4]


def test_an_expert_that_comes_begins_anew_and_one_that_stays_goes_on(tmp_path):
    config, task = settings(SMALL, tmp_path, **RANDOM), NanoTask(SMALL)

    def work(transport: ThreadTransport):
        site = Site(config, task, transport)
        site.begin_round()
        for _ in range(2):
            site.local_step()
        site.end_round()
        before = site.optimizer.state()
        site.begin_round()
        return before, site.optimizer.state(), site.tensors

    for before, after, tensors in run_sites(4, work):
        came = [t.name for t in tensors if f"exp_avg/{t.name}" not in before]
        assert came, "or this test shows nothing"
        for tensor in tensors:
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                name = f"{kind}/{tensor.name}"
                if tensor.name in came:
                    assert name not in after
                    assert after[f"age/{tensor.name}"].item() == 0
                else:
                    assert torch.equal(after[name], before[name])


def test_the_learning_rate_of_an_expert_that_came_grows_to_the_others(tmp_path):
    site = train(tmp_path, dataclasses.replace(SMALL, rounds=1), **RANDOM)[0]
    name, value = next(iter(site.optimizer.values.items()))
    site.optimizer.warm_up([name])
    factors = []
    for _ in range(4):
        for tensor in site.tensors:
            tensor.parameter.grad = torch.zeros_like(tensor.parameter)
        site.optimizer.step(6.0)
        groups = site.optimizer._torch.param_groups
        factors.append(next(g["lr"] / 6.0 for g in groups if any(p is value for p in g["params"])))
    assert factors == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]


def test_a_warm_up_goes_on_where_its_saved_state_was():
    """By hand, with SGD: steps of 1/4, 2/4, 3/4 and 4/4 of the learning rate, saved after two."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    tensors = [ModelTensor("expert", parameter)]
    sgd = OptimizerConfig(name="sgd", weight_decay=0.0)
    optimizer = InnerOptimizer(tensors, sgd, warmup_steps=4)
    optimizer.warm_up(["expert"])
    values = []
    for step in range(4):
        if step == 2:
            saved = optimizer.state()
            optimizer = InnerOptimizer(tensors, sgd, warmup_steps=4)
            optimizer.load(saved.items())
        parameter.grad = torch.ones(1)
        optimizer.step(-4.0)
        values.append(parameter.item())
    assert values == [1, 3, 6, 10]


def test_a_warm_up_that_has_become_shorter_is_over(tmp_path):
    site = train(tmp_path, dataclasses.replace(SMALL, rounds=2), **RANDOM)[0]
    state = site.optimizer.state()
    assert 2 in [value.item() for name, value in state.items() if name.startswith("age/")]
    for warmup_steps in (0, 2):
        optimizer = InnerOptimizer(site.tensors, site.config.optimizer, warmup_steps)
        optimizer.load(state.items())
        optimizer.step(1.0)
        assert optimizer.age == {}


def test_random_places_of_experts_that_are_everywhere_change_nothing(tmp_path):
    everywhere = dataclasses.replace(SMALL, overlap=4)
    assert_same(
        train(tmp_path, everywhere, placement="random", shuffle_every=1),
        train(tmp_path, dataclasses.replace(SMALL, strategy="diloco")),
    )


def test_full_replica_rounds_are_diloco(tmp_path):
    assert_same(
        train(tmp_path, full_replica_rounds=3),
        train(tmp_path, dataclasses.replace(SMALL, strategy="diloco")),
    )


@pytest.mark.parametrize("strategy", ["fomoe", "ddp"])
def test_a_site_whose_loss_is_not_finite_is_left_out_and_comes_back(strategy, tmp_path):
    config = dataclasses.replace(SMALL, strategy=strategy)
    task = PoisonedTask(config, poisoned={1})
    rejected = {}

    def work(transport: ThreadTransport):
        site = Site(settings(config, tmp_path), task, transport)
        for index in range(3):
            site.begin_round()
            for _ in range(2):
                site.local_step()
            site.end_round()
            rejected.setdefault(index, set()).add(tuple(sorted(site.rejected)))
        return site

    sites = run_sites(4, work)
    assert rejected == {0: {()}, 1: {(1,)}, 2: {()}}
    for site in sites:
        assert all(torch.isfinite(tensor.value).all() for tensor in site.tensors)
        assert all(torch.isfinite(value).all() for value in site.optimizer.state().values())


def test_a_tensor_that_only_a_rejected_site_holds_rests(tmp_path):
    config = dataclasses.replace(SMALL, overlap=1, rounds=2, warmup=0, min_ratio=1.0)
    before = parameters(train(tmp_path, dataclasses.replace(config, rounds=1)))
    sites = train(tmp_path, config, PoisonedTask(config, {1}))
    for tensor in sites[1].tensors:
        same = torch.equal(tensor.value, before[tensor.name])
        assert same == (not tensor.on_every_site), tensor.name


def test_a_run_in_which_every_site_fails_ends_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"every site are no longer finite: lower optimizer\.lr"):
        train(tmp_path, task=PoisonedTask(SMALL, poisoned={0, 1, 2, 3}))


class FrozenTask(NanoTask):
    """Of the first layer only the router is trained."""

    def build_model(self, residents):
        model = super().build_model(residents)
        model.layers[0].requires_grad_(False)
        model.layers[0].moe.router.requires_grad_(True)
        return model


@pytest.mark.parametrize(
    "changes",
    [
        {"outer": "average"},
        {"outer": "local_adamw", "placement": "random"},
        {"codec": "int4", "placement": "random"},
        {"strategy": "ddp"},
    ],
)
def test_what_is_not_trained_keeps_its_bits_and_does_not_travel(changes, tmp_path):
    config = dataclasses.replace(SMALL, **changes)
    task = FrozenTask(config)
    values = settings(config, tmp_path).to_dict()
    values["optimizer"]["weight_decay"] = 0.1
    sites = train_in_threads(Config.from_dict(values), task)
    before = dict(nano.tensors(task.build_model(None)))
    for site in sites:
        for tensor in site.tensors:
            assert torch.equal(tensor.value, before[tensor.name]) != tensor.is_trained, tensor.name
        trained = {tensor.name for tensor in site.tensors if tensor.is_trained}
        assert {piece.tensor for piece in site.meetings.exchange.pieces} == trained
        assert {name.partition("/")[2] for name in site.optimizer.state()} == trained


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("outer", ["nesterov", "average"])
def test_holders_agree_to_the_bit_through_every_codec(codec, outer, tmp_path):
    config = dataclasses.replace(SMALL, outer=outer)
    sites = train(tmp_path, config, codec=codec, placement="random", shuffle_every=1)
    seen: dict[str, torch.Tensor] = {}
    for site in sites:
        for tensor in site.tensors:
            assert torch.equal(seen.setdefault(tensor.name, tensor.value), tensor.value)


def test_what_a_codec_lost_is_dropped_by_one_that_loses_nothing(tmp_path):
    config = dataclasses.replace(SMALL, rounds=1)
    sites = train(tmp_path, config, codec="int8")
    state = sites[0].meetings.state()
    kinds = {"outer_momentum", "lost_up", "lost_down"}
    assert {name.partition("/")[0] for name in state} == kinds
    for codec, kept in (("int4", kinds), ("fp32", {"outer_momentum"})):
        site = Site(settings(config, tmp_path, codec=codec), NanoTask(config), sites[0].transport)
        site.meetings.load(state)
        assert {name.partition("/")[0] for name in site.meetings.state()} == kept


def test_local_adamw_averages_the_moments_as_well(tmp_path):
    config = dataclasses.replace(SMALL, outer="local_adamw")
    first, second, *_ = train(tmp_path, config)
    moments, others = first.optimizer.state(), second.optimizer.state()
    common = [name for name in moments if name in others and name.startswith("exp_avg")]
    assert any(".experts." in name for name in common)
    assert all(torch.equal(moments[name], others[name]) for name in common)
