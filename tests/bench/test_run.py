# SPDX-License-Identifier: Apache-2.0
"""Both benchmarks from the command line to the JSON lines, at sizes that take moments."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fomoe.bench import run, skip, table
from fomoe.bench.clock import require_device
from fomoe.bench.shapes import SHAPES
from fomoe.bench.skip import Model, residents
from fomoe.cli import main
from fomoe.errors import UserError
from fomoe.models import CONFIGURATIONS

TINY = Model("tiny", replace(CONFIGURATIONS["tiny"], num_layers=2), 32, 1, 16)
QUICK = ["--repetitions", "1"]


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fomoe.bench.machine._TRIES", 1)
    monkeypatch.setattr("fomoe.bench.machine._COPY_BYTES", 2**20)


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch):
    """Fails the test when anything is measured."""

    def fail(*_: object) -> None:
        raise AssertionError("measured")

    for name in ("machine", "measure_layers"):
        monkeypatch.setattr(run, name, fail)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_layers_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "layers.jsonl"
    file.write_text("old\n")
    assert main(["bench", "--shape", "32,16,8,8,2", *QUICK, "--output", str(file)]) == 0
    records = lines(file)
    assert [(r["dtype"], r["pass"], r["contender"]) for r in records] == [
        (dtype, name, contender)
        for dtype in ("bf16", "fp32")
        for name in ("forward", "forward+backward")
        for contender in ("fomoe", "torch", "hf_eager", "hf_grouped_mm")
    ]
    for record in records:
        assert record["benchmark"] == "layer"
        assert list(record["shape"].values()) == [32, 16, 8, 8, 2]
        assert record["repetitions"] == 1
        assert record["best_ms"] == record["median_ms"] > 0
        assert record["quartiles_ms"] == [record["median_ms"]] * 2
        assert record["ratio_quartiles"] == [record["ratio"]] * 2
        assert (record["ratio"] == 1) == (record["contender"] == "fomoe")
        assert record["gemm_share"] > 0
        assert record["agreement"]["output"] <= record["agreement"]["tolerance"]
        assert record["machine"]["threads"] == 1
        assert set(record["machine"]["gemm_gflops"]) == {"bf16", "fp32"}
        assert record["versions"].keys() >= {"fomoe", "torch", "transformers", "commit"}
        assert record["command"] == (
            "fomoe bench --shape 32,16,8,8,2 --dtype bf16 --dtype fp32 --repetitions 1 --threads 1"
        )
    out, err = capsys.readouterr()
    assert out.count("32,16,8,8,2") == 4
    assert err == ""  # progress is for terminals


def test_without_transformers_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = tmp_path / "layers.jsonl"
    arguments = ["--shape", "32,16,8,8,2", "--dtype", "fp32", *QUICK, "--output", str(file)]
    assert main(["bench", *arguments]) == 0
    assert {record["contender"] for record in lines(file)} == {"fomoe", "torch"}
    assert capsys.readouterr().out.count("pip install 'fomoe[hf]'") == 1


def test_skipping_end_to_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(skip, "MODELS", (TINY,))
    file = tmp_path / "skip.jsonl"
    assert main(["bench", "--skip", *QUICK, "--output", str(file)]) == 0
    records = lines(file)
    assert [(r["part"], r["wanted_ghost_share"]) for r in records] == [
        (part, share) for part in ("experts", "layer", "step") for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    for record in records:
        assert record["benchmark"] == "skip"
        assert record["model"] == "tiny"
        assert record["tokens"] == (16 if record["part"] == "step" else 32)
        tokens_per_second = record["tokens"] / record["median_ms"] * 1e3
        assert record["tokens_per_second"] == pytest.approx(tokens_per_second)
        assert record["ghost_share"] == pytest.approx(record["wanted_ghost_share"], abs=0.2)
        assert record["config"]["num_experts"] == 16
        assert record["command"] == "fomoe bench --skip --repetitions 1 --threads 1"
    ends = [record for record in records if record["wanted_ghost_share"] in (0, 1)]
    assert all(record["ghost_share"] == record["wanted_ghost_share"] for record in ends)
    assert all(r["cost"] == r["ideal_speedup"] == 1 for r in ends if r["ghost_share"] == 0)
    # Where experts are all there is, nothing is left to bound.
    assert [r["ideal_speedup"] for r in ends if r["part"] == "experts"] == [1, None]
    assert "Expert part at 50% ghosts: " in capsys.readouterr().out


def test_residents_are_nested_and_shifted_from_layer_to_layer():
    config = TINY.config  # 16 experts
    assert residents(config, 0.0) == list(range(16))
    assert residents(config, 0.75) == [0, 1, 2, 3]
    assert residents(config, 0.75, layer=14) == [0, 1, 14, 15]
    assert residents(config, 1.0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2"], "--shape: expected five positive integers T,D,F,E,K such as"),
        (["--dtype", "int8"], "--dtype: expected one of bf16, fp32, got 'int8'"),
        (["--skip", "--dtype", "bf16"], "--skip: expected no --shape and no --dtype"),
        (["--skip", "--shape", "8,8,8,8,8"], "--skip: expected no --shape and no --dtype"),
        (["--output", "missing/folder/file"], "cannot write missing/folder/file: "),
        (["--device", "tpu"], "--device: expected one of cpu, cuda, got 'tpu'"),
        (["--device", "tpu", "--skip"], "--device: expected one of cpu, cuda, got 'tpu'"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_measured(
    no_measuring: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_gpu_that_is_not_there_is_one_sentence(
    no_measuring: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: --device: cuda: torch {torch.__version__} finds no GPU here\n"


def test_a_fomoe_without_cuda_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fomoe._C.compiled_with_cuda", lambda: False)
    with pytest.raises(UserError, match=r"^--device: cuda: this fomoe was built without CUDA"):
        require_device("cuda")


def record(contender: str, ratio: float) -> dict[str, Any]:
    return {
        "shape": SHAPES[2]._asdict(),
        "dtype": "bf16",
        "pass": "forward+backward",
        "contender": contender,
        "median_ms": 12345.6,
        "ratio": ratio,
        "ratio_quartiles": [ratio - 0.1, ratio + 0.1],
        "gemm_share": 0.5,
        "agreement": {"output": 1e-3, "gradient": 2e-3, "tolerance": 1e-2},
        "missing": {"scattermoe": "not installed"},
        "activation_mib": 123.4,
    }


def test_the_table_names_the_baseline_we_gain_least_on_and_fits_80_columns():
    case = [record("fomoe", 1), record("hf_grouped_mm", 0.96), record("torch", 1.5)]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.print_layers(console, [case])
    text = console.export_text()
    assert "1024,512,1792,8,2 bf16  fwd+bwd 12346 hf_grouped_mm 12346 0.96x 0.86-1.06  50%" in text
    assert "bf16 2e-03" in text
    assert "Without scattermoe: not installed." in text
    assert "MiB kept, 1024,512,1792,8,2: 123; least other: hf_grouped_mm 123" in text
    assert max(map(len, text.splitlines())) <= 81
