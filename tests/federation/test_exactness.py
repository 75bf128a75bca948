# SPDX-License-Identifier: Apache-2.0
"""The trainer against the oracle examples/nano_fomoe.py, bit for bit (fp32, same threads)."""

import dataclasses
import math

import pytest
import torch
from nano_task import batch, momenta, nano, train_nano, train_sites

from fomoe.nn import named_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = nano.Config(
    sites=4, overlap=2, rounds=3, local_steps=2, warmup=2, num_experts=8, top_k=2, dim=32,
    expert_dim=16,
)  # fmt: skip


def variant(**changes):
    return dataclasses.replace(SMALL, **changes)


def inner_optimizer(model, config):
    return torch.optim.AdamW(
        model.parameters(), config.lr, config.betas, config.eps, config.weight_decay, foreach=False
    )


def local_step(model, optimizer, config, step):
    """A step of plain training on the tokens of site 0."""
    optimizer.zero_grad()
    tokens = batch(0, step)
    logits = model(tokens[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    loss = loss + sum(m.auxiliary_loss for m in model.modules() if hasattr(m, "auxiliary_loss"))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()


def assert_equal_to_the_bit(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


@pytest.mark.parametrize(
    "config",
    [
        variant(),
        variant(sites=3, num_experts=6),
        variant(outer="average"),
        variant(strategy="diloco", sites=3),
        variant(strategy="ddp"),
        variant(overlap=1),
        variant(sites=1, overlap=1),
    ],
    ids=["4-sites", "3-sites", "average", "diloco", "ddp", "one-holder", "one-site"],
)
def test_trainer_equals_the_oracle_in_parameters_and_momenta(config, tmp_path):
    expected = train_nano(config)
    checkpoint = train_sites(config, tmp_path)
    assert_equal_to_the_bit(checkpoint.model(), expected.parameters)
    if config.strategy != "ddp" and config.outer == "nesterov":
        assert_equal_to_the_bit(momenta(checkpoint, config), expected.momenta)


def test_fomoe_with_every_expert_everywhere_is_the_oracles_diloco(tmp_path):
    expected = train_nano(variant(strategy="diloco"))
    everywhere = train_sites(variant(overlap=4), tmp_path)
    assert_equal_to_the_bit(everywhere.model(), dict(expected.parameters))


def test_one_site_that_averages_is_plain_training(tmp_path):
    config = variant(sites=1, overlap=1, outer="average")
    trained = train_sites(config, tmp_path).model()
    model = nano.initialize(nano.Model(config), config.seed)
    optimizer = inner_optimizer(model, config)
    total = config.rounds * config.local_steps
    for step in range(total):
        progress = (step - config.warmup) / (total - config.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        decayed = config.min_ratio + (1 - config.min_ratio) * cosine
        factor = (step + 1) / config.warmup if step < config.warmup else decayed
        optimizer.param_groups[0]["lr"] = config.lr * factor
        local_step(model, optimizer, config, step)
    assert_equal_to_the_bit(trained, dict(named_tensors(model)))


def test_one_site_with_nesterov_looks_ahead(tmp_path):
    config = variant(sites=1, overlap=1, warmup=0, min_ratio=1.0)
    trained = train_sites(config, tmp_path).model()
    model = nano.initialize(nano.Model(config), config.seed)
    tensors = dict(named_tensors(model))
    optimizer = inner_optimizer(model, config)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for step in range(config.rounds * config.local_steps):
        if step % config.local_steps == 0:
            start = {name: tensor.clone() for name, tensor in tensors.items()}
        local_step(model, optimizer, config, step)
        if (step + 1) % config.local_steps == 0:
            for name, tensor in tensors.items():
                delta = start[name] - tensor
                momentum[name] = momentum[name] * config.outer_momentum + delta
                ahead = delta + momentum[name] * config.outer_momentum
                tensor.copy_(start[name] - ahead * config.outer_lr)
    assert_equal_to_the_bit(trained, tensors)


def test_one_local_step_of_sgd_is_synchronous_large_batch_sgd(tmp_path):
    config = variant(
        strategy="diloco", outer="average", inner="sgd", dtype=torch.float64, local_steps=1,
        rounds=3, warmup=0, min_ratio=1.0, clip=0.0, lr=0.1, balance_loss_coefficient=0.0,
        z_loss_coefficient=0.0,
    )  # fmt: skip
    trained = train_sites(config, tmp_path).model()
    model = nano.initialize(nano.Model(config).to(config.dtype), config.seed)
    for step in range(3):
        tokens = torch.cat([batch(site, step) for site in range(config.sites)])
        logits = model(tokens[:, :-1]).flatten(0, 1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= config.lr * parameter.grad
    for name, value in named_tensors(model):
        torch.testing.assert_close(trained[name], value, rtol=1e-12, atol=1e-12)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    config = variant(warmup=0, min_ratio=1.0)  # a schedule that does not know the end
    whole = train_sites(config, tmp_path / "whole")
    train_sites(dataclasses.replace(config, rounds=1), tmp_path / "parts")
    resumed = train_sites(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert resumed.manifest["completed_rounds"] == 3
    assert_equal_to_the_bit(resumed.model(), whole.model())
    for site in range(config.sites):
        assert_equal_to_the_bit(resumed.state(site), whole.state(site))
