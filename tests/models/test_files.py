# SPDX-License-Identifier: Apache-2.0
"""Model files are read whole, in part, or refused in one sentence."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fomoe.errors import UserError
from fomoe.models import (
    MODEL_FORMAT_VERSION,
    Decoder,
    RopeScaling,
    configuration,
    load_model,
    read_config,
    read_tokenizer_files,
    save_model,
)
from fomoe.models.files import model_header
from fomoe.nn import initialize, named_tensors


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(configuration("tiny"))
    initialize(decoder, seed=1)
    return decoder


def write(path, model, **header):
    settings = json.dumps({"family": "decoder", **asdict(model.config)})
    known = {"fomoe_format_version": str(MODEL_FORMAT_VERSION), "fomoe_model": settings}
    tensors = {name: tensor.clone() for name, tensor in named_tensors(model)}
    save_file(tensors, path, {k: v for k, v in (known | header).items() if v is not None})
    return path


TOKENS = torch.arange(12).view(1, 12)


def test_a_file_with_a_header_written_by_hand_computes_the_same(model, tmp_path):
    read = load_model(write(tmp_path / "m.safetensors", model))
    assert not read.training
    assert torch.equal(read(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ["m.safetensors", "folder", "new/folder"])
def test_a_saved_model_computes_the_same(tmp_path, name):
    config = replace(
        configuration("tiny"), dense_layers=(1,), dense_dim=48, router_bias=True, head_norm=True,
        qkv_bias=True, shared_expert_dim=8, tie_embeddings=False,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
    )  # fmt: skip
    model = Decoder(config)
    torch.nn.init.normal_(model.layers[0].moe.router.bias)
    save_model(model, tmp_path / name)
    read = load_model(tmp_path / name)
    assert read.config == read_config(tmp_path / name) == config
    assert torch.equal(read(TOKENS), model(TOKENS))


def test_a_folder_has_the_tokenizer_beside_the_model(model, tmp_path):
    tokenizer = {"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}
    for content in (tokenizer, {"tokenizer.json": b"{ }"}):
        save_model(model, tmp_path, content)
    assert read_tokenizer_files(tmp_path) == tokenizer | {"tokenizer.json": b"{ }"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", *tokenizer}


def test_others_may_read_a_model_as_any_new_file(model, tmp_path):
    (tmp_path / "new").touch()
    save_model(model, tmp_path / "model.safetensors")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_weights_have_the_dtype_of_the_file_or_the_one_asked_for(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(Decoder(model.config).bfloat16(), path)
    assert {p.dtype for p in load_model(path).parameters()} == {torch.bfloat16}
    wide = load_model(path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert torch.equal(wide.norm.weight.bfloat16(), load_model(path).norm.weight)


def test_a_model_that_cannot_be_written_is_refused(model, tmp_path):
    part = Decoder(model.config, [(0, 1), (2,)])
    with pytest.raises(UserError, match="expected all experts to be in the model"):
        save_model(part, tmp_path / "m")
    with pytest.raises(UserError, match="a tokenizer needs a folder"):
        save_model(model, tmp_path / "m.safetensors", {"tokenizer.json": b""})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        save_model(model, tmp_path / "file" / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_a_model_and_a_file_without_a_tensor_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="cannot read model"):
        load_model(tmp_path)
    path = write(tmp_path / "m.safetensors", model)
    tensors = load_file(path)
    del tensors["layers.1.moe.experts.3.w2"]
    save_file(tensors, path, model_header(model.config))
    with pytest.raises(UserError, match=r"lacks layers\.1\.moe\.experts\.3\.w2"):
        load_model(path)
    load_model(path, [range(16), (0, 1)])


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
        ({"fomoe_model": '{"family": "other"}'}, "expected one of decoder, foe, got 'other'"),
        ({"fomoe_model": '{"dim": 64}'}, "family: expected one of decoder, foe, got None"),
        ({"fomoe_format_version": "2"}, "format version 2; this fomoe reads up to 1"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(model, tmp_path, header, sentence):
    path = write(tmp_path / "m.safetensors", model, **header)
    with pytest.raises(UserError, match=sentence):
        load_model(path)


def test_a_tensor_of_another_shape_is_refused_by_name(model, tmp_path):
    settings = {"family": "decoder", **asdict(model.config), "vocab_size": 300}
    path = write(tmp_path / "m.safetensors", model, fomoe_model=json.dumps(settings))
    with pytest.raises(UserError, match=r"embedding.weight must have shape \(300, 64\), got"):
        load_model(path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("hello")
    with pytest.raises(UserError, match="cannot read model"):
        load_model(path)
