# SPDX-License-Identifier: Apache-2.0
"""The executable paper does what it says: it is what the real trainer is compared with."""

import ast
import importlib.util
import math
import re
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PATH = Path(__file__).resolve().parents[2] / "examples" / "nano_fomoe.py"
spec = importlib.util.spec_from_file_location("nano_fomoe", PATH)
nano = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = nano
spec.loader.exec_module(nano)

TINY = nano.Config(
    sites=4,
    overlap=2,
    rounds=3,
    local_steps=2,
    warmup=2,
    dim=32,
    num_heads=2,
    num_experts=4,
    expert_dim=24,
    top_k=2,
)


def batches(site, step, sequences=3):
    generator = torch.Generator().manual_seed(100 * step + site)
    return torch.randint(256, (sequences, 17), generator=generator)


def moments(run):
    """One dict per site: every inner AdamW moment by tensor name."""
    return [
        {f"{key}/{n}": x[key] for n, x in state.items() for key in ("exp_avg", "exp_avg_sq")}
        for _, state in run.sites
    ]


def expert_of(name):
    """(layer, expert) of a tensor of an expert; None for others, and for a row of a full router."""
    match = re.fullmatch(r"layers\.(\d+)\.moe\.experts\.(\d+)\.w[12]", name)
    return match and (int(match[1]), int(match[2]))


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        as_bytes = [x.contiguous().view(torch.uint8) for x in (left[name], right[name])]
        assert torch.equal(*as_bytes), f"{name} differs"


def objective(model, batch):
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    return loss + sum(layer.moe.auxiliary_loss for layer in model.layers)


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
