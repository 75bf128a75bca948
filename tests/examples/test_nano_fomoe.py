# SPDX-License-Identifier: Apache-2.0
"""The executable paper does what it says: it is what the real trainer is compared with."""

import ast
import math
import re
import runpy
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from nano_example import PATH, TINY, assert_same_bits, batches, moments, nano, objective


def plain_adamw(config, after_step=lambda step, model: None):
    """One site and no federation, written down once more."""
    model = nano.Model(config)
    nano.initialize(model, config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,
    )
    total = config.rounds * config.local_steps
    for step in range(total):
        if step < config.warmup:
            factor = (step + 1) / config.warmup
        else:
            progress = (step - config.warmup) / (total - config.warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            factor = config.min_ratio + (1 - config.min_ratio) * cosine
        optimizer.param_groups[0]["lr"] = config.lr * factor
        model.zero_grad()
        objective(model, batches(0, step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        after_step(step, model)
    return model


# --- the file itself ------------------------------------------------------------------------------


def test_file_is_short_and_stands_alone():
    source = PATH.read_text()
    assert len(source.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_script_prints_a_line_per_strategy(tmp_path, capsys):
    script = tmp_path / "nano_fomoe.py"
    short = PATH.read_text().replace("rounds=6, local_steps=16", "rounds=1, local_steps=1")
    script.write_text(short)
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ddp", "diloco", "fomoe"]
    for line in lines:
        loss = float(re.search(r"\[([\d.]+)\]", line)[1])
        assert abs(loss - math.log(256)) < 1  # untrained: every byte is as likely


# --- training -------------------------------------------------------------------------------------


def test_one_site_with_average_is_plain_adamw():
    config = replace(TINY, sites=1, overlap=1, outer="average")
    run = nano.train(config, batches)
    assert_same_bits(run.parameters, dict(nano.tensors(plain_adamw(config))))
    assert run.momenta == {}
    assert run.ghost_share == [0, 0, 0]


def test_one_site_with_nesterov_is_the_look_ahead_loop():
    config = replace(TINY, sites=1, overlap=1, outer="nesterov")
    start = dict(nano.tensors(nano.initialize(nano.Model(config), config.seed)))
    momentum = {name: torch.zeros_like(tensor) for name, tensor in start.items()}

    def look_ahead(step, model):
        if (step + 1) % config.local_steps == 0:
            for name, now in nano.tensors(model):
                delta = start[name] - now
                momentum[name] = momentum[name] * 0.9 + delta
                start[name] = start[name] - (delta + momentum[name] * 0.9) * 0.7
                now.copy_(start[name])

    run = nano.train(config, batches)
    assert_same_bits(run.parameters, dict(nano.tensors(plain_adamw(config, look_ahead))))
    assert_same_bits(run.momenta, momentum)


@pytest.mark.parametrize(
    "everywhere",
    [{"overlap": 4}, {"overlap": 4, "placement": "random"}, {"full_replica_rounds": 2}],
    ids=["fixed", "random", "first-rounds"],
)
@pytest.mark.parametrize(
    ("outer", "router"),
    [("nesterov", "full"), ("average", "partitioned"), ("local_adamw", "full")],
)
def test_fomoe_with_every_expert_everywhere_is_diloco(outer, router, everywhere):
    config = replace(TINY, outer=outer, router=router, rounds=2)
    fomoe = nano.train(replace(config, moved_warmup_steps=5, **everywhere), batches)
    diloco = nano.train(replace(config, strategy="diloco"), batches)
    assert_same_bits(fomoe.parameters, diloco.parameters)
    assert_same_bits(fomoe.momenta, diloco.momenta)
    for left, right in zip(moments(fomoe), moments(diloco), strict=True):
        assert_same_bits(left, right)
    assert fomoe.losses == diloco.losses
    assert fomoe.bytes_per_site == diloco.bytes_per_site


@pytest.mark.parametrize("strategy", ["ddp", "diloco", "fomoe"])
def test_runs_are_identical_to_the_bit(strategy):
    config = replace(TINY, strategy=strategy, rounds=2)
    first, second = (nano.train(config, batches) for _ in range(2))
    assert_same_bits(first.parameters, second.parameters)
    assert_same_bits(first.momenta, second.momenta)
    assert first.losses == second.losses


def test_bits_are_sensitive_to_the_order_of_the_sites():
    """The comparisons above would notice a mean that is summed in another order."""
    config = replace(TINY, strategy="diloco", rounds=1)
    forward = nano.train(config, batches).parameters
    backward = nano.train(config, lambda site, step: batches(3 - site, step)).parameters
    names = [name for name in forward if not torch.equal(forward[name], backward[name])]
    assert len(names) > len(forward) / 2
    for name in forward:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-4, atol=1e-5)


def test_averaging_after_every_sgd_step_is_large_batch_sgd():
    config = replace(
        TINY,
        strategy="diloco",
        outer="average",
        inner="sgd",
        local_steps=1,
        rounds=4,
        lr=0.5,
        clip=math.inf,
        balance_loss_coefficient=0.0,  # the one term that is not a mean over tokens
        dtype=torch.float64,
    )
    run = nano.train(config, lambda site, step: batches(site, step, sequences=site + 1))

    model = nano.initialize(nano.Model(config).double(), config.seed)
    for step in range(4):
        model.zero_grad()
        big = torch.cat([batches(site, step, sequences=site + 1) for site in range(4)])
        objective(model, big).backward()
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 2))
        factor = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * cosine
        for parameter in model.parameters():
            parameter.data -= 0.5 * factor * parameter.grad
    for name, expected in nano.tensors(model):
        error = (run.parameters[name] - expected).norm() / expected.norm()
        assert error < 1e-12, name
    start = dict(nano.tensors(nano.initialize(nano.Model(config).double(), config.seed)))
    moved = start["embedding.weight"] - run.parameters["embedding.weight"]
    assert moved.norm() > 1e-2 * start["embedding.weight"].norm()


def test_ddp_sites_stay_identical_and_follow_the_large_batch():
    config = replace(TINY, strategy="ddp", balance_loss_coefficient=0.0, dtype=torch.float64)
    run = nano.train(config, batches)
    for model, _ in run.sites:
        assert_same_bits(dict(nano.tensors(model)), run.parameters)
    alone = replace(config, sites=1)
    big = nano.train(alone, lambda _, step: torch.cat([batches(site, step) for site in range(4)]))
    for name, tensor in run.parameters.items():
        torch.testing.assert_close(tensor, big.parameters[name], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(run.losses, big.losses)


@pytest.mark.parametrize("outer", ["nesterov", "average", "local_adamw"])
def test_holders_agree_after_a_round(outer):
    run = nano.train(replace(TINY, outer=outer), batches)
    held = Counter()
    for model, _ in run.sites:
        views = dict(nano.tensors(model))
        held.update(views.keys())
        assert_same_bits(views, {name: run.parameters[name] for name in views})
    assert {n for name, n in held.items() if ".experts." in name} == {2}
    assert {n for name, n in held.items() if ".experts." not in name} == {4}
    assert all(0.2 < share < 0.8 for share in run.ghost_share)


def test_local_adamw_averages_the_moments_and_average_does_not():
    name = "exp_avg/layers.0.moe.experts.1.w1"  # on sites 2 and 3
    for outer, agree in (("local_adamw", True), ("average", False)):
        sites = moments(nano.train(replace(TINY, outer=outer), batches))
        assert [name in site for site in sites] == [False, False, True, True]
        assert torch.equal(sites[2][name], sites[3][name]) is agree


def test_router_rows_are_tensors_of_their_own():
    run = nano.train(replace(TINY, rounds=1), batches)
    row = "layers.0.moe.router.1.weight"
    assert run.parameters[row].shape == (32,)
    for model, _ in run.sites:
        assert model.layers[0].moe.router.on_every_site
        assert_same_bits({row: run.parameters[row]}, {row: dict(nano.tensors(model))[row]})


def test_router_rows_travel_with_their_expert_when_partitioned():
    run = nano.train(replace(TINY, router="partitioned"), batches)
    row = "layers.0.moe.router.1.weight"  # on sites 2 and 3
    views = [dict(nano.tensors(model)) for model, _ in run.sites]
    assert [row in view for view in views] == [False, False, True, True]
    assert_same_bits({row: views[2][row]}, {row: views[3][row]})
    assert run.parameters[row].shape == (32,)
    assert run.ghost_share == [0, 0, 0]
    assert "layers.0.moe.router.weight" not in run.parameters


def test_traffic_by_hand():
    # One expert: w1 and w2, 24 x 32 float32 each; 2 layers of 4 experts.
    experts = 2 * 4 * 2 * 24 * 32 * 4
    shared = 4 * (256 * 32 + 32 + 2 * (4 * 32 + 4 * 32 * 32 + 4 * 32) + 32)
    one_round = {
        "ddp": 2 * 2 * 3 * (shared + experts),  # in each of 2 steps
        "diloco": 2 * 3 * (shared + experts),
        "fomoe": 2 * 3 * shared + 2 * 1 * experts,
    }
    for strategy, total in one_round.items():
        run = nano.train(replace(TINY, strategy=strategy, rounds=2), batches)
        assert run.bytes_per_site == [total / 4] * 2
    run = nano.train(replace(TINY, outer="local_adamw", rounds=1), batches)
    assert run.bytes_per_site == [3 * one_round["fomoe"] / 4]
    # Two values to a byte, and a scale for 128; a vector of 32 fills a block, as a router row does.
    rows, vectors = 2 * 4, 2 + 2 * 4
    blocks = 2 * 3 * ((shared - 4 * 32 * (rows + vectors)) // 512 + rows + vectors)
    run = nano.train(replace(TINY, codec="int4", rounds=1), batches)
    assert run.bytes_per_site == [68 * (blocks + 2 * experts // 512) / 4]


def test_traffic_of_moving_experts_by_hand():
    """From everywhere to two sites each: no site fetches weights, but momenta change owners."""
    config = replace(TINY, num_layers=1, full_replica_rounds=1, rounds=2)
    # Owners 0 1 2 3 at first; then the first of the holders (0 1), (2 3), (0 1), (2 3): 0 2 1 3.
    moved = 2 * (2 * 24 * 32 + 32) * 4  # experts 1 and 2, and their router rows
    there = nano.train(replace(config, full_replica_rounds=0), batches).bytes_per_site[1]
    assert nano.train(config, batches).bytes_per_site[1] == there + moved / 4


def test_assembled_model_holds_every_expert_and_skips_nothing():
    run = nano.train(TINY, batches)
    model = nano.assemble(nano.Model(TINY), run.parameters)
    assert_same_bits(dict(nano.tensors(model)), run.parameters)
    model(batches(0, 0)[:, :-1])
    assert [layer.moe.ghost_share for layer in model.layers] == [0, 0]


def test_training_learns_the_text():
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40))
    windows = text.unfold(0, 17, 7)

    def draw(site, step):
        generator = torch.Generator().manual_seed(100 * step + site)
        return windows[torch.randint(len(windows), (4,), generator=generator)]

    for strategy in ("ddp", "diloco", "fomoe"):
        losses = nano.train(replace(TINY, strategy=strategy, rounds=2, local_steps=8), draw).losses
        assert losses[0] > 3.5
        assert losses[-1] < 2.5
