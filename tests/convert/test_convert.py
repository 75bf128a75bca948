# SPDX-License-Identifier: Apache-2.0
"""A dense model becomes one with experts: the same with all of them, resumable, or refused."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fomoe.convert import convert as module
from fomoe.convert.convert import Observer, convert
from fomoe.convert.memory import memory_estimate
from fomoe.convert.settings import Conversion
from fomoe.errors import UserError
from fomoe.generate import Generation, generate
from fomoe.models import DecoderConfig, load_model
from fomoe.models.pretrained import load_dense

SHAPE = {
    "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
TOKENS = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
QUICK = {"expert_size": 6, "steps": 3, "tokens": 256, "held_out_tokens": 128,
         "sequence_length": 32, "batch_size": 64}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def source_of(folder, family="llama"):
    torch.manual_seed(1)
    config, model = FAMILIES[family]
    dense = model(config(**SHAPE))
    torch.nn.init.normal_(dense.get_input_embeddings().weight)  # so that tokens differ
    dense.save_pretrained(folder)
    return folder


def converted(source, out, **settings):
    dtype = settings.pop("dtype", None)
    options = {key: settings.pop(key) for key in ("resume", "observer") if key in settings}
    conversion = Conversion(**QUICK | settings)
    convert(source, out, conversion, device=torch.device("cpu"), dtype=dtype, **options)
    return load_model(out)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
def test_with_all_experts_it_is_the_dense_model(family, dtype, tolerance, tmp_path):
    source = source_of(tmp_path / "dense", family)
    dense, _ = load_dense(source, dtype=dtype)
    model = converted(source, tmp_path / "moe", active_share=1.0, dtype=dtype)
    assert [layer.moe.config.num_experts for layer in model.layers] == [4, 4, 4]
    with torch.no_grad():
        expected, actual = dense(TOKENS), model(TOKENS)
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "method",
    ["dot", "dot-literal", "random", "weight-cluster", "activation-cluster", "core", "tiers",
     "prune"],
)  # fmt: skip
def test_every_method_writes_a_model_that_loads_and_generates(method, tmp_path):
    source = source_of(tmp_path / "dense")
    model = converted(source, tmp_path / "moe", method=method, active_share=0.5)
    report = json.loads((tmp_path / "moe" / "conversion.json").read_text())
    assert report["settings"]["method"] == method
    assert len(report["layers"]) == 3
    assert [len(text) for text in generate(model, [[1, 2]], Generation(max_new_tokens=5))] == [5]


def test_layers_that_are_not_converted_stay(tmp_path):
    source = source_of(tmp_path / "dense")
    model = converted(source, tmp_path / "moe", layers=(0, 2))
    dense, _ = load_dense(source)
    assert [layer.moe is None for layer in model.layers] == [False, True, False]
    assert torch.equal(model.layers[1].feed_forward.w1, dense.layers[1].feed_forward.w1)


def test_distillation_and_fine_tuning_lower_what_they_train_on(tmp_path):
    source = source_of(tmp_path / "dense")
    seen = {"distill": [], "fine-tune": []}
    observer = Observer(stage_step=lambda stage, progress: seen[stage].append(progress.loss))
    converted(
        source, tmp_path / "moe", active_share=0.5, distill_steps=6, fine_tune_steps=12,
        observer=observer,
    )  # fmt: skip
    assert [len(losses) for losses in seen.values()] == [6, 12]
    assert seen["fine-tune"][-1] < seen["fine-tune"][0]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {folder!r})
import test_convert as t
from fomoe.convert.convert import Observer, convert
from fomoe.convert.settings import Conversion
def die(layer, quality):
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path({source!r}), Path({out!r}), Conversion(**t.QUICK), device=torch.device("cpu"),
        observer=Observer(layer_done=die))
"""


def test_a_killed_conversion_goes_on_to_the_same_bits(tmp_path):
    source, out = source_of(tmp_path / "dense"), tmp_path / "moe"
    expected = converted(source, tmp_path / "whole")
    program = KILLED.format(folder=os.path.dirname(__file__), source=str(source), out=str(out))
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(UserError, match="go on with --resume, or remove it"):
        converted(source, out)
    with pytest.raises(UserError, match="--resume: the unfinished conversion has steps = 3, got 4"):
        converted(source, out, resume=True, steps=4)
    begun = []
    observer = Observer(layer_step=lambda layer, progress: begun.append(layer))
    model = converted(source, out, resume=True, observer=observer)
    assert set(begun) == {2}
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_out_appears_whole_or_the_conversion_can_be_resumed(tmp_path, monkeypatch):
    source, out = source_of(tmp_path / "dense"), tmp_path / "moe"
    save = module.save_model

    def fails_half_way(model, folder, tokenizer):
        save(model, folder, tokenizer)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_model", fails_half_way)
    with pytest.raises(UserError, match=r"cannot write .*moe: No space left on device"):
        converted(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".moe.conversion", "dense"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="--resume: the unfinished conversion has dtype"):
        converted(source, out, resume=True, dtype=torch.bfloat16)
    converted(source, out, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_layers_left_without_their_settings_are_not_taken_over(tmp_path):
    source = source_of(tmp_path / "dense")
    left = tmp_path / ".moe.conversion"
    left.mkdir()
    for layer in range(3):
        (left / f"layer_{layer:03}.safetensors").write_bytes(b"of another conversion")
    converted(source, tmp_path / "moe")
    assert not left.exists()


def test_a_damaged_layer_is_named(tmp_path):
    source, out = source_of(tmp_path / "dense"), tmp_path / "moe"
    observer = Observer(layer_done=lambda layer, quality: 1 / (1 - layer))
    with pytest.raises(ZeroDivisionError):
        converted(source, out, observer=observer)
    (tmp_path / ".moe.conversion" / "layer_000.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot read .*layer_000.safetensors"):
        converted(source, out, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**40}, "--seed: expected at most 4294967296"),
        ({"expert_size": 7}, "--expert-size: expected a divisor of the feed-forward width 24, got "
         "7; the nearest that fit: 4 \\(6 experts\\), 6 \\(4 experts\\), 8 \\(3 experts\\), 12"),
        ({"method": "dott"}, "--method: expected one of dot, .*, got 'dott'"),
        ({"active_share": 0.0}, "--active-share: expected above 0 and at most 1, got 0"),
        ({"method": "core", "active_share": 0.25}, "--active-share: method core needs at least 2"),
        ({"layers": (0, 3)}, "--layers: expected some of 0 to 2, got \\[0, 3\\]"),
        ({"tokens": 10**13}, "--tokens: the conversion needs up to"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    source = source_of(tmp_path / "dense")
    with pytest.raises(UserError, match=message):
        converted(source, tmp_path / "moe", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_folder_that_exists_is_refused(tmp_path):
    source = source_of(tmp_path / "dense")
    with pytest.raises(UserError, match="exists already"):
        converted(source, source)


def test_an_8b_llama_is_estimated_to_fit_an_80_gb_card():
    llama_3_8b = DecoderConfig(
        vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        expert_dim=1, num_experts=1, top_k=1, dense_layers=tuple(range(32)), dense_dim=14336,
        tie_embeddings=False,
    )  # fmt: skip
    memory = memory_estimate(llama_3_8b, Conversion(), element_size=2)
    assert 25e9 < memory.total < 80e9
