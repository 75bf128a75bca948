# SPDX-License-Identifier: Apache-2.0
"""What one does with a model of transformers works on our ops too."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import MODELS, configuration, experts_of, pair, routers_of, tiny_model, tokens

from fomoe.integrations.transformers import replace_moe_blocks
from fomoe.integrations.transformers.replace_gates import FusedGate

# Loads with plain transformers what was saved, and saves the logits.
PLAIN = """
import sys
sys.modules["fomoe"] = None  # importing it fails
import torch, transformers
tokens = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    torch.save(model(tokens).logits.detach(), folder + "/logits.pt")
"""


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_tokens(name):
    replaced, original = pair(name, torch.float32)
    prompts = tokens(length=5)
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0  # a shorter prompt
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        generated = []
        for model in (replaced, original):
            torch.manual_seed(0)
            generated.append(
                model.generate(prompts, attention_mask=mask, max_new_tokens=12, **settings)
            )
        assert generated[0].shape == (2, 17)
        assert torch.equal(*generated)


def test_what_is_saved_loads_here_and_where_there_is_no_fomoe(tmp_path):
    expected = {}
    for name in MODELS:
        model = tiny_model(name, torch.float32)
        assert replace_moe_blocks(model) == 2
        model.save_pretrained(tmp_path / name)
        assert "fomoe" not in (tmp_path / name / "config.json").read_text()
        loaded = type(model).from_pretrained(tmp_path / name, dtype=torch.float32)
        assert not any(isinstance(module, FusedGate) for module in loaded.modules())
        assert replace_moe_blocks(loaded) == 2
        expected[name] = model(tokens()).logits
        assert_same(loaded(tokens()).logits, expected[name])
    torch.save(tokens(), tmp_path / "tokens.pt")
    folders = [str(tmp_path / name) for name in MODELS]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "tokens.pt"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    for name in MODELS:
        assert_same(torch.load(tmp_path / name / "logits.pt"), expected[name])


def test_the_experts_alone_can_be_asked_for_when_loading(tmp_path):
    original = tiny_model("mixtral", torch.float32)
    original.save_pretrained(tmp_path)
    loaded = type(original).from_pretrained(
        tmp_path, dtype=torch.float32, experts_implementation="fomoe"
    )
    assert_same(loaded(tokens()).logits, original(tokens()).logits)
    assert replace_moe_blocks(loaded) == 2  # the routers were left


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_gradient_checkpointing_changes_no_gradient(name, use_reentrant):
    model = tiny_model(name).train()
    replace_moe_blocks(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
            assert model.is_activation_checkpointing
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_the_whole_model_compiles_as_one_graph(name):
    model = tiny_model(name, torch.float32).train()
    replace_moe_blocks(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(tokens(), labels=tokens(), use_cache=False)
        output.loss.backward()
        results.append((output.logits, [router.weight.grad for router in routers_of(model)]))
    (expected, expected_gradients), (logits, gradients) = results
    assert_same(logits, expected)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_same(actual, wanted)


def test_autocast_computes_in_its_dtype():
    experts = experts_of(tiny_model("mixtral", torch.float32, experts_implementation="fomoe"))[0]
    x = torch.randn(4, 18, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[0, 3], [2, 1], [4, 0], [1, 2]]), torch.full((4, 2), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
    expected = experts.to(torch.bfloat16)(x.bfloat16(), ids, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected.float())


def test_logits_under_autocast_differ_by_its_rounding():
    outputs = []
    for model in pair("mixtral", torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(tokens(), labels=tokens()))
        outputs[-1].loss.backward()
    actual, expected = (output.logits for output in outputs)
    assert actual.dtype == expected.dtype
    assert (actual - expected).norm() < 0.04 * expected.norm()


def test_copies_and_pickles_keep_the_gate():
    replaced, _ = pair("deepseek_v3")
    expected = replaced(tokens()).logits
    for other in (copy.deepcopy(replaced), pickle.loads(pickle.dumps(replaced))):
        assert sum(isinstance(module, FusedGate) for module in other.modules()) == 2
        assert torch.equal(other(tokens()).logits, expected)


def test_models_of_one_configuration_share_the_experts_but_not_the_gate():
    config = configuration("olmoe")
    first, second = (transformers.OlmoeForCausalLM(config) for _ in range(2))
    assert replace_moe_blocks(first) == 2
    assert second.config._experts_implementation == "fomoe"
    assert replace_moe_blocks(second) == 2


def test_configurations_do_not_name_us():
    replaced, original = pair("qwen3_moe")
    assert json.loads(replaced.config.to_json_string()) == json.loads(
        original.config.to_json_string()
    )


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("fomoe.integrations", "transformers.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'fomoe\[hf\]'"):
        importlib.import_module("fomoe.integrations.transformers")
