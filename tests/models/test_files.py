# SPDX-License-Identifier: Apache-2.0
"""Model files are read whole, in part, or refused in one sentence."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from fomoe.errors import UserError
from fomoe.models import MODEL_FORMAT_VERSION, Decoder, configuration, load_model
from fomoe.nn import initialize, named_tensors


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(configuration("tiny"))
    initialize(decoder, seed=1)
    return decoder


def write(path, model, **header):
    settings = json.dumps(asdict(model.config))
    known = {"fomoe_format_version": str(MODEL_FORMAT_VERSION), "fomoe_model": settings}
    tensors = {name: tensor.clone() for name, tensor in named_tensors(model)}
    save_file(tensors, path, {k: v for k, v in (known | header).items() if v is not None})
    return path


def test_a_written_model_computes_the_same(model, tmp_path):
    tokens = torch.arange(12).view(1, 12)
    read = load_model(write(tmp_path / "m.safetensors", model))
    assert not read.training
    assert torch.equal(read(tokens), model(tokens))


def test_only_the_named_experts_are_read(model, tmp_path):
    path = write(tmp_path / "m.safetensors", model)
    part = load_model(path, resident_experts=[(0, 5), (3,)])
    whole = dict(named_tensors(model))
    for name, tensor in named_tensors(part):
        assert torch.equal(tensor, whole[name])
    assert part.layers[1].moe.experts.w1.shape[0] == 1


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"fomoe_model": None}, "has no fomoe model in its header"),
        ({"fomoe_model": '{"dim":'}, "does not describe a fomoe model"),
        ({"fomoe_model": '{"unheard_of": 1}'}, "does not describe a fomoe model"),
        ({"fomoe_format_version": None}, "does not describe a fomoe model"),
        ({"fomoe_format_version": "2"}, "format version 2; this fomoe reads up to 1"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(model, tmp_path, header, sentence):
    path = write(tmp_path / "m.safetensors", model, **header)
    with pytest.raises(UserError, match=sentence):
        load_model(path)


def test_a_tensor_of_another_shape_is_refused_by_name(model, tmp_path):
    settings = asdict(model.config) | {"vocab_size": 300}
    path = write(tmp_path / "m.safetensors", model, fomoe_model=json.dumps(settings))
    with pytest.raises(UserError, match=r"embedding.weight must have shape \(300, 64\), got"):
        load_model(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("hello")
    with pytest.raises(UserError, match="cannot read model"):
        load_model(path)
