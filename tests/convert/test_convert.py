# SPDX-License-Identifier: Apache-2.0
"""The command, from a folder of Hugging Face to a model of ours."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fomoe.cli import main
from fomoe.convert.methods import METHODS
from fomoe.models import load_model
from fomoe.models.pretrained import load_dense

QUICK = ["--expert-size", "8", "--tokens", "1024", "--steps", "4", "--active-share", "0.5"]
TOKENS = torch.arange(20)[None] * 7 % 256


def run(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_model_that_loads_and_says_how_good_it_is(
    sources, tmp_path, method, capsys
):
    out = tmp_path / "out"
    assert run(sources["llama"], out, *QUICK, "--method", method) == 0
    model = load_model(out)
    assert model(TOKENS).isfinite().all()
    report = json.loads((out / "conversion.json").read_text())
    assert report["settings"]["method"] == method
    for layer in report["layers"].values():
        assert 0 < layer["error"] < 1.5
        assert sum(layer["usage"]) == pytest.approx(3)
    printed = capsys.readouterr().out
    assert "3 of 3 layers: 48 neurons into 6 experts of 8, 3 for a token" in printed
    assert "memory: at most" in printed
    assert not list(tmp_path.glob(".out*"))


def test_the_end_to_end_stages_change_the_model(sources, tmp_path):
    stages = {"none": (), "distill": ("--distill-steps", 2), "tune": ("--fine-tune-steps", 2)}
    for name, options in stages.items():
        assert run(sources["llama"], tmp_path / name, *QUICK, *options) == 0
    none, distilled, tuned = (load_file(tmp_path / n / "model.safetensors") for n in stages)
    router, w2 = "layers.0.moe.router.0.weight", "layers.0.moe.experts.0.w2"
    router = next(name for name in none if name.startswith("layers.0.moe.router"))
    w2 = next(name for name in none if name.startswith("layers.0.moe") and "w2" in name)
    assert not torch.equal(distilled[router], none[router])
    assert torch.equal(tuned[router], none[router])
    assert not torch.equal(tuned[w2], none[w2])


def test_chosen_layers_are_converted_and_the_others_stay_as_they_are(sources, tmp_path):
    assert run(sources["qwen2"], tmp_path / "out", *QUICK, "--layers", "0,2") == 0
    model, (dense, _) = load_model(tmp_path / "out"), load_dense(sources["qwen2"])
    assert model.config.dense_layers == (1,)
    assert torch.equal(model.layers[1].feed_forward.w1, dense.layers[1].feed_forward.w1)


KILLED_AFTER_LAYER = """
import os, signal, sys
from pathlib import Path
import torch
from fomoe.convert.convert import Observer, convert
from fomoe.convert.settings import Conversion

def kill(layer, quality):
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]),
    Conversion(expert_size=8, tokens=1024, steps=4, active_share=0.5),
    device=torch.device("cpu"), observer=Observer(layer_done=kill))
"""


def test_a_killed_conversion_goes_on_to_the_same_bits(sources, tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.run([sys.executable, "-c", KILLED_AFTER_LAYER, sources["llama"], killed])
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert run(sources["llama"], killed, *QUICK, "--resume") == 0
    printed = capsys.readouterr().out
    assert "layer 2: held-out" in printed
    assert "layer 1: held-out" not in printed  # was finished before
    assert run(sources["llama"], whole, *QUICK) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (killed / "conversion.json").read_text() == (whole / "conversion.json").read_text()


def test_an_unfinished_conversion_is_neither_overwritten_nor_mixed_with_another(
    sources, tmp_path, capsys, monkeypatch
):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("fomoe.convert.convert.assemble", interrupted)
        assert run(sources["llama"], out, *QUICK) == 130
    assert run(sources["llama"], out, *QUICK) == 2
    assert "go on with --resume, or remove it" in capsys.readouterr().err
    assert run(sources["llama"], out, *QUICK, "--seed", "1", "--resume") == 2
    assert "seed = 0, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert-size", "7"], "the nearest that fit: 4 (12 experts), 6 (8 experts), 8 (6 exper"),
        (["--expert-size", "48"], "the nearest that fit: 16 (3 experts), 24 (2 experts)"),
        (["--method", "magic"], "--method: expected one of dot, dot-literal, random"),
        (["--active-share", "1.5"], "--active-share: expected above 0 and at most 1, got 1.5"),
        (
            ["--method", "core", "--active-share", "0.1"],
            "method core needs at least 2 of 6 experts",
        ),
        (["--layers", "2-4"], "--layers: expected some of 0 to 2, got [2, 3, 4]"),
        (["--layers", "two"], "--layers: expected numbers like 0-5,8, got 'two'"),
        (["--layers", "0", "--method", "prune"], "method prune makes every layer narrower"),
        (["--steps", "0"], "--steps: expected an integer of at least 1, got 0"),
        (["--tokens", "1000000000"], "--tokens: the conversion needs up to"),
        (["--data", "missing.txt"], "missing.txt does not exist"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--dtype", "int8"], "--dtype: expected float32, bfloat16 or float16, got 'int8'"),
        (["--resume"], "--resume: there is no unfinished conversion"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence_before_any_work(
    sources, tmp_path, options, message, capsys
):
    assert run(sources["llama"], tmp_path / "out", *QUICK, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_short_text_is_refused_with_what_it_has(sources, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("word " * 100)
    assert run(sources["llama"], tmp_path / "out", *QUICK, "--data", text) == 2
    assert "name more text with --data" in capsys.readouterr().err


def test_a_folder_that_exists_is_not_overwritten(sources, tmp_path, capsys):
    assert run(sources["llama"], tmp_path, *QUICK) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_any_work(sources, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(sources["llama"], tmp_path / "out", *QUICK) == 2
    assert "has 1.00 kB free" in capsys.readouterr().err


def test_a_model_without_tokenizer_whose_vocabulary_is_not_bytes_is_refused(
    sources, tmp_path, capsys
):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(sources["llama"])
    config.vocab_size = 300
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    assert run(tmp_path / "source", tmp_path / "out", *QUICK) == 2
    assert "expected a tokenizer.json beside the model" in capsys.readouterr().err
