# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism across sites: the same training as with every expert everywhere."""

import pytest
import torch
from in_process import train_in_threads
from nano_task import NanoTask, nano

from fomoe.comm import ExpertExchange
from fomoe.errors import UserError
from fomoe.federation.config import Config
from fomoe.federation.ledger import expected_round_bytes
from fomoe.federation.parameters import federated_tensors
from fomoe.federation.task import LanguageModelTask

DIM, LAYERS, TOP_K = 16, 2, 2


class UnevenTask(LanguageModelTask):
    """Sites see different numbers of tokens, so that the weights of the mean matter."""

    def batch(self, site, step):
        return super().batch(site, step)[: site + 1]


def config(strategy, **sections):
    settings = {
        "model": {
            "dim": DIM,
            "num_layers": LAYERS,
            "num_heads": 2,
            "expert_dim": 8,
            "num_experts": 8,
            "top_k": TOP_K,
            "shared_expert_dim": 8,
        },
        "federation": {"strategy": strategy, "sites": 4, "rounds": 2, "local_steps": 2},
        "optimizer": {"name": "sgd", "lr": 0.5, "clip_norm": 0.1},
        "training": {"batch_size": 4, "sequence_length": 16, "threads": 1},
        "data": {"max_bytes": 100_000, "validation_sequences": 4},
    }
    for name, section in sections.items():
        settings[name] = settings[name] | section
    return Config.from_dict(settings)


def trained(settings):
    """The values by name, and the sites."""
    sites = train_in_threads(settings, UnevenTask(settings))
    return {t.name: t.value for site in sites for t in site.tensors}, sites


@pytest.mark.parametrize("clip_norm", [0.1, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("router", ["full", "partitioned"])
def test_it_trains_as_if_every_site_had_every_expert(clip_norm, router):
    sections = {"optimizer": {"clip_norm": clip_norm}, "model": {"router": router}}
    ours, sites = trained(config("ep", **sections))
    right, _ = trained(config("ddp", **sections))
    assert ours.keys() == right.keys()
    moved = 0
    start = {t.name: t.value for t in federated_tensors(sites[0].task.build_model(None))}
    for name, value in right.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name
        moved += bool((value - start[name]).abs().max() > 0)
    assert moved == len(right)


def test_a_site_holds_only_its_own_experts():
    _, sites = trained(config("ep"))
    held = [{(t.layer, t.expert) for t in site.tensors if not t.on_every_site} for site in sites]
    assert [len(experts) for experts in held] == [LAYERS * 2] * 4
    assert len(set.union(*held)) == LAYERS * 8


def test_the_ledger_has_the_rows_both_ways():
    settings = config("ep")
    sites = train_in_threads(settings, UnevenTask(settings))
    by_class = [site.ledger.close_round() for site in sites]
    totals = {name: sum(line[name] for line in by_class) for name in by_class[0]}
    # Forward and backward; a row there and a row back, ids and weights, gradients of both.
    exchanges = [e for site in sites for e in site.expert_parallelism.exchanges]
    assert totals["activations"] == sum(e.bytes_sent["inter_site"] for e in exchanges)
    steps, counts = 4, 4 * 3 * (3 + 4 + 4) * 8 * LAYERS
    rows, rest = divmod(totals["activations"] - steps * counts, 4 * (4 * DIM) + TOP_K * (4 + 4 + 4))
    tokens = sum(range(1, 5)) * 16 * steps * LAYERS
    assert rest == 0
    assert 0 < rows <= tokens * TOP_K
    placement = sites[0].placement
    sizes = {t.name: 4 * t.num_elements for t in sites[0].tensors}
    shared = sum(sizes[t.name] for t in sites[0].tensors if t.expert is None)
    formula = expected_round_bytes(
        placement, shared_bytes=shared, expert_bytes=0, router_bytes=4 * DIM
    )
    assert totals["shared"] == steps * formula["shared"]
    assert totals["router"] == steps * formula["router"]
    assert totals["expert"] == 0


def test_a_task_without_such_a_model_is_refused():
    nano_config = nano.Config(sites=2, overlap=1, num_experts=4, top_k=1, dim=16, expert_dim=8)
    settings = config("ep", federation={"sites": 2})
    with pytest.raises(UserError, match="build_expert_parallel_model, got NanoTask"):
        train_in_threads(settings, NanoTask(nano_config))


@pytest.mark.parametrize(
    ("federation", "message"),
    [
        ({"overlap": 2}, "federation.overlap = 2 must be 1 with federation.strategy = 'ep'"),
        ({"router_mean": "holders"}, "federation.router_mean = 'holders' must be 'all'"),
        ({"scale_expert_steps": True}, "federation.scale_expert_steps = True must be False"),
        (
            {"ranks_per_site": 2, "spread_experts": True},
            "federation.spread_experts = True must be False",
        ),
        ({"codec": "int8"}, "cannot be used with federation.strategy = 'ep'"),
        ({"placement": "random"}, "with 'ep' no expert changes its sites"),
    ],
)
def test_settings_that_mean_nothing_are_refused(federation, message):
    with pytest.raises(UserError, match=message):
        config("ep", federation=federation)


def test_the_exchange_counts_only_what_leaves_the_site():
    # One site: no row crosses, and none is counted.
    settings = config("ep", federation={"sites": 1})
    (site,) = train_in_threads(settings, UnevenTask(settings))
    assert isinstance(site.expert_parallelism.exchanges[0], ExpertExchange)
    assert site.ledger.close_round()["activations"] == 0
