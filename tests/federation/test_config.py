# SPDX-License-Identifier: Apache-2.0
"""Settings: a hand-worked file, its defaults, and one sentence per mistake."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fomoe.errors import UserError
from fomoe.federation.config import Config, load_config

FOMOE = '[federation]\nstrategy = "fomoe"\nsites = 4\noverlap = 2\n'


def load(folder: Path, text: str, *overrides: str) -> Config:
    file = folder / "run.toml"
    file.write_text(text)
    return load_config(file, overrides)


def message(folder: Path, text: str, *overrides: str) -> str:
    """The error's text, without the folder."""
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_file_is_read_with_its_types(tmp_path: Path):
    config = load(
        tmp_path,
        """
        [model]
        dim = 64
        num_heads = 2
        num_experts = 16
        score = "sigmoid"
        [federation]
        strategy = "fomoe"
        sites = 4
        overlap = 1
        [optimizer]
        betas = [0.8, 0.99]
        lr = 1
        [data]
        paths = ["a.txt", "b"]
        [run]
        save = false
        """,
    )
    assert config.model.num_experts == 16
    assert config.federation.overlap == 1
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.optimizer.lr == 1.0
    assert config.data.paths == ("a.txt", "b")
    assert config.run.save is False


def test_defaults_are_the_papers_and_follow_other_settings(tmp_path: Path):
    config = load(tmp_path, '[model]\ndim = 96\nnum_heads = 3\n[federation]\nstrategy = "diloco"')
    assert (config.federation.outer_lr, config.federation.outer_momentum) == (0.7, 0.9)
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.95), 1e-8)
    assert config.federation.overlap == config.federation.sites == 4
    assert (config.model.num_kv_heads, config.model.head_dim) == (3, 32)


def test_overrides_win_in_order_and_words_need_no_quotes(tmp_path: Path):
    config = load(
        tmp_path,
        FOMOE,
        "federation.rounds=3",
        "federation.rounds=5",
        "run.folder=runs/a b=c",
        "training.precision=bf16",
        'data.paths=["x y.txt"]',
        "data.domain_per_site=true",
    )
    assert config.federation.rounds == 5
    assert config.run.folder == "runs/a b=c"
    assert config.training.precision == "bf16"
    assert config.data.paths == ("x y.txt",)
    assert config.data.domain_per_site is True


def test_sources_are_an_array_of_tables_with_defaults(tmp_path: Path):
    table = '[[data.sources]]\npath = "a.jsonl"\nweight = 3\n[[data.sources]]\npath = "b"\n'
    config = load(tmp_path, FOMOE + table, "data.tokenizer=tokenizer.json")
    first, second = config.data.sources
    assert (first.path, first.weight, first.format, first.field) == ("a.jsonl", 3, "auto", "text")
    assert second.weight == 1
    assert config.data.tokenizer == "tokenizer.json"
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_survive_json_and_are_frozen(tmp_path: Path):
    config = load(tmp_path, FOMOE, "optimizer.betas=[0.5, 0.75]")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValidationError):
        config.federation.rounds = 3  # type: ignore[misc]


@pytest.mark.filterwarnings("error")
def test_devices_of_single_sites_survive_json(tmp_path: Path):
    config = load(tmp_path, FOMOE, 'training.device=["cpu", "cuda", "cuda:1", "cpu"]')
    assert config.training.device_of(2) == "cuda:1"
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_named_model_survives_json_and_keeps_its_own_vocabulary(tmp_path: Path):
    config = load(tmp_path, FOMOE + '[model]\nname = "small"\nvocab_size = 300')
    assert config.to_dict()["model"] == {"name": "small", "vocab_size": 300}
    assert Config.from_dict(config.to_dict()) == config
    own = load(tmp_path, FOMOE + '[model]\nname = "small"')
    assert own.to_dict()["model"] == {"name": "small"}
    assert "vocab_size" not in Config.from_dict(own.to_dict()).model.model_fields_set


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("federation.sites=four", "federation.sites: expected an integer, got 'four'"),
        ("federation.sites=true", "federation.sites: expected an integer, got true"),
        ("federation.rounds=0", "federation.rounds: expected a number >= 1, got 0"),
        (
            "federation.outer_momentum=1",
            "federation.outer_momentum: expected a number < 1.0, got 1",
        ),
        ("optimizer.lr=inf", "optimizer.lr: expected a finite number, got inf"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: expected one more value, got none"),
        ("optimizer.betas=0.9", "optimizer.betas: expected an array, got 0.9"),
        ("run.save=1", "run.save: expected true or false, got 1"),
        ("run.folder=3", "run.folder: expected a string, got 3"),
        ("run.folder=", "run.folder: expected a string that is not empty, got ''"),
        ("data.paths=[1]", "data.paths[0]: expected a string, got 1"),
        ("data.sources=a.jsonl", "data.sources: expected an array, got 'a.jsonl'"),
        ('data.sources=["a"]', "data.sources[0]: expected a table, got 'a'"),
        ("data.sources=[{}]", "data.sources[0].path: expected a value, got none"),
        (
            'data.sources=[{path="a", weight=0.0}]',
            "data.sources[0].weight: expected a number > 0.0, got 0.0",
        ),
        (
            'data.sources=[{path="a"}, {path="b", format="csv"}]',
            "data.sources[1].format: expected one of 'auto', 'text', 'jsonl' or 'parquet', "
            "got 'csv'",
        ),
        (
            'data.sources=[{path="a", wieght=2}]',
            "unknown key 'data.sources[0].wieght': did you mean 'weight'?",
        ),
        (
            "federation.strategy=fedavg",
            "federation.strategy: expected one of 'ddp', 'ep', 'diloco' or 'fomoe', got 'fedavg'",
        ),
        (
            "federation.local_step=3",
            "unknown key 'federation.local_step': did you mean 'local_steps'?",
        ),
        ("evaluation.x=3", "unknown key 'evaluation.x': [evaluation] knows every, batch_size"),
        ("optimiser.lr=3", "unknown section 'optimiser': did you mean 'optimizer'?"),
    ],
)
def test_one_wrong_override_is_named_with_what_was_expected(
    tmp_path: Path, override: str, expected: str
):
    found = message(tmp_path, FOMOE, override)
    source = "run.toml" if "section" in expected else f"override {override}"
    assert found == f"{source}: {expected}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["federation.overlap=5"], "federation.overlap = 5 is larger than federation.sites = 4"),
        (
            ["model.num_experts=7"],
            "model.num_experts = 7 times federation.overlap = 2 is not divisible by "
            "federation.sites = 4, so sites cannot hold equally many experts",
        ),
        (
            ["federation.strategy=ddp"],
            "federation.overlap = 2 must equal federation.sites = 4 with "
            "federation.strategy = 'ddp', which holds every expert on every site",
        ),
        (["model.top_k=9"], "model.top_k = 9 is larger than model.num_experts = 8"),
        (
            ["model.dim=250"],
            "model.dim = 250 is not divisible by model.num_heads = 4 (or set model.head_dim)",
        ),
        (
            ["model.num_kv_heads=3"],
            "model.num_heads = 4 is not divisible by model.num_kv_heads = 3",
        ),
        (["model.head_dim=3"], "model.head_dim = 3 must be even, for the rotary embedding"),
        (
            ["federation.rounds=2", "federation.local_steps=4", "optimizer.warmup_steps=9"],
            "optimizer.warmup_steps = 9 is more than the run's 8 steps (federation.rounds = 2 "
            "times federation.local_steps = 4)",
        ),
        (
            ["model.name=small", "model.dim=64"],
            "model.name = 'small' fixes the model, so model.dim cannot be set as well",
        ),
        (
            ["federation.moved_warmup_steps=3", "federation.full_replica_rounds=1"],
            "federation.moved_warmup_steps = 3, but no expert comes to a site during the run: that "
            "takes federation.placement = 'random' and federation.overlap < federation.sites",
        ),
        (
            ["federation.strategy=diloco", "federation.overlap=4", "federation.placement=random"],
            "federation.placement = 'random' needs federation.strategy = 'fomoe'; with 'diloco' no "
            "expert changes its sites",
        ),
        (
            ["federation.shuffle_every=2"],
            "federation.shuffle_every = 2 does not fit federation.placement = 'fixed': 'random' "
            "draws one every so many rounds, at least 1; 'fixed' draws none, 0",
        ),
        (
            ["federation.full_replica_rounds=11"],
            "federation.full_replica_rounds = 11 is more than federation.rounds = 10",
        ),
        (
            ["federation.strategy=ddp", "federation.overlap=4", "federation.codec=int8"],
            "federation.codec = 'int8' cannot be used with federation.strategy = 'ddp': error "
            "feedback needs rounds",
        ),
        (
            ["federation.outer=local_adamw", "federation.codec=bf16"],
            "federation.codec = 'bf16' cannot be used with federation.outer = 'local_adamw', whose "
            "moments are no differences: use 'fp32'",
        ),
        (
            ["federation.outer=local_adamw", "optimizer.name=sgd"],
            "federation.outer = 'local_adamw' needs optimizer.name = 'adamw', got 'sgd'",
        ),
        (
            ["federation.outer=average", "federation.router_mean=rescaled"],
            "federation.router_mean = 'rescaled' scales differences, but federation.outer = "
            "'average' averages values: use 'nesterov'",
        ),
        (
            ["federation.outer=average", "federation.scale_expert_steps=true"],
            "federation.scale_expert_steps = True scales differences, but federation.outer = "
            "'average' averages values: use 'nesterov'",
        ),
        (
            ["federation.ranks_per_site=2", "training.device=cuda:1"],
            "training.device = 'cuda:1' is a single GPU, but federation.ranks_per_site = 2: "
            "with 'cuda' every rank gets one of its own",
        ),
        (
            ["federation.spread_experts=true"],
            "federation.spread_experts = True needs federation.ranks_per_site of at least 2, got 1",
        ),
        (
            [
                "federation.spread_experts=true",
                "federation.ranks_per_site=2",
                "model.capacity_factor=1.5",
            ],
            "model.capacity_factor = 1.5 must be 0 where tokens travel to experts of other ranks: "
            "only the tokens of all ranks together could fill one",
        ),
        (
            ["federation.ranks_per_site=3"],
            "training.batch_size = 8, the sequences of a site, is not divisible by "
            "federation.ranks_per_site = 3",
        ),
        (
            ["training.device=gpu"],
            "training.device: expected 'cpu', 'cuda' or 'cuda:' and a number, got 'gpu'",
        ),
        (
            ['training.device=["cpu", "cuda:0", 1, "cpu"]'],
            "training.device[2]: expected 'cpu', 'cuda' or 'cuda:' and a number, got 1",
        ),
        (
            ['training.device=["cpu", "cuda"]'],
            "training.device has 2 entries, but federation.sites = 4",
        ),
        (['data.paths=["a", "a"]'], "data.paths names 'a' 2 times"),
        (
            ['data.sources=[{path="a"}]', 'data.paths=["b"]'],
            "data.paths and data.sources cannot be set together",
        ),
        (
            ['data.sources=[{path="a"}]', "data.max_bytes=9"],
            "data.max_bytes and data.sources cannot be set together",
        ),
        (["data.tokenizer=a.json"], "data.tokenizer needs data.sources, got none"),
        (["data.separator=<end>"], "data.separator needs data.sources, got none"),
        (
            ['data.sources=[{path="a"}, {path="b"}, {path="a"}]'],
            "data.sources[2] is data.sources[0] again: both read 'a'",
        ),
        (
            [
                'data.sources=[{path="a"}, {path="b", weight=3.0}]',
                "data.domain_per_site=true",
            ],
            "data.sources[1].weight = 3.0 differs from data.sources[0].weight = 1.0, but with "
            "data.domain_per_site every site reads one source only",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    tmp_path: Path, overrides: list[str], expected: str
):
    assert message(tmp_path, FOMOE, *overrides) == f"run.toml with overrides: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '[federation]\nstratgy = "ddp"',
            "unknown key 'federation.stratgy': did you mean 'strategy'?",
        ),
        (
            "[federation]",
            "federation.strategy: expected one of 'ddp', 'ep', 'diloco', 'fomoe', got none",
        ),
        ("", "federation: expected a table, got none"),
        ("federation = 3", "federation: expected a table, got 3"),
        (
            '[federation]\nstrategy = "fomoe"',
            "federation.overlap is missing: federation.strategy = 'fomoe' needs the number of "
            "sites that hold each expert, from 1 to federation.sites = 4",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, expected: str):
    assert message(tmp_path, text) == f"run.toml: {expected}"


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    assert message(tmp_path, "[federation").startswith("run.toml is not valid TOML: ")
    with pytest.raises(UserError, match=r"absent\.toml does not exist"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(UserError, match=r"cannot read configuration file .*: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    with pytest.raises(UserError, match=r"latin\.toml is not UTF-8 at byte offset 5"):
        load_config(tmp_path / "latin.toml")


def test_an_override_without_a_value_is_refused(tmp_path: Path):
    assert message(tmp_path, FOMOE, "rounds") == (
        "override 'rounds': expected section.key=value, for example federation.local_steps=20"
    )
