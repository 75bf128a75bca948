# SPDX-License-Identifier: Apache-2.0
"""The example of fomoe inside a foreign model does what it says, eagerly and compiled."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "examples" / "your_model.py"
spec = importlib.util.spec_from_file_location("your_model", PATH)
your_model = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = your_model  # torch.compile looks it up by name
spec.loader.exec_module(your_model)


def test_it_prints_falling_losses_of_both_models(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(PATH)])
    runpy.run_path(str(PATH), run_name="__main__")
    printed = capsys.readouterr().out
    lines = re.findall(r"^(.+): loss ([\d.]+) -> ([\d.]+) nats per byte$", printed, re.MULTILINE)
    assert [name for name, _, _ in lines] == ["fomoe.MoE", "own module"]
    for _, first, last in lines:
        assert float(first) > 5  # log 256 = 5.5
        assert float(last) < 0.5


def test_the_block_knows_nothing_of_fomoe():
    torch.manual_seed(0)
    losses = your_model.train(torch.nn.Linear(your_model.D, your_model.D))
    assert losses[-1] < losses[0]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiling_changes_nothing():
    losses = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        losses.append(your_model.train(your_model.OwnMoE(), backend))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
