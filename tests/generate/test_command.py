# SPDX-License-Identifier: Apache-2.0
"""`fomoe generate`: from text to text, and what is refused before a weight is read."""

import io
import json

import pytest
import torch
from generation_models import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fomoe.errors import UserError
from fomoe.generate import Generation, Sampling, generate
from fomoe.generate.command import Request, run
from fomoe.generate.text import text_of
from fomoe.models import save_model

WORDS = ["the", "cat", "sat", "on", "mat", "end"]


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "end"}).encode(),
    }


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bytes"
    save_model(tiny_model(vocab_size=256, context_length=40), folder)
    return folder


@pytest.fixture(scope="module")
def word_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "words"
    save_model(tiny_model(vocab_size=6), folder, word_tokenizer())
    return folder


def written(folder, prompts, **settings):
    out, report = io.StringIO(), io.StringIO()
    settings = {"max_new_tokens": 8, "sampling": Sampling()} | settings
    run(Request(checkpoint=folder, prompts=prompts, **settings), out, report)
    return out.getvalue(), report.getvalue()


def test_the_text_is_the_prompt_and_what_the_model_makes_of_it(byte_model):
    model = tiny_model(vocab_size=256)
    (tokens,) = generate(model, [list(b"Once")], Generation(max_new_tokens=8))
    text, report = written(byte_model, ["Once"])
    assert text == "Once" + bytes(tokens).decode("utf-8", errors="replace") + "\n"
    assert "4 prompt tokens, first new ones after" in report
    assert "tokens/s in all" in report


def test_several_prompts_come_one_after_another(byte_model):
    text, _ = written(byte_model, ["a", "long one"])
    first, second = (written(byte_model, [prompt])[0] for prompt in ("a", "long one"))
    assert text == f"--- 1\n{first}--- 2\n{second}"


def test_words_of_the_tokenizer_beside_the_model_and_its_end(word_model):
    text = text_of(word_model, None, vocab_size=6)
    assert text.encode("cat sat") == [1, 2]
    assert text.stop_tokens == {5}
    written_text, _ = written(word_model, ["the cat"], sampling=Sampling(temperature=3.0))
    assert written_text.startswith("the cat")
    assert set(written_text.split()) <= {*WORDS} - {"end"}


@pytest.mark.parametrize("prompt", ["a 🦙", "é🦙🦙🦙"])
def test_characters_made_of_tokens_for_bytes_come_whole(prompt, tmp_path):
    tokens = {"▁": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(tokens, [], byte_fallback=True, unk_token="▁"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    text = text_of(tmp_path, None, vocab_size=258)
    written_text = "🦙🦙🦙🦙 a漢漢éé漢a"
    decoding = text.decoding(text.encode(prompt))
    pieces = [decoding.push(token) for token in text.encode(written_text)]
    assert "".join(pieces) + decoding.end() == written_text


def test_a_separator_that_is_a_special_token_ends_a_text(tmp_path):
    tokenizer = Tokenizer.from_buffer(word_tokenizer()["tokenizer.json"])
    tokenizer.add_special_tokens(["<|end|>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    assert text_of(tmp_path, None, 7, separator="<|end|>").stop_tokens == {6}
    assert text_of(tmp_path, None, 7, separator="mat").stop_tokens == frozenset()


def test_capacity_of_training_does_not_make_texts_depend_on_each_other(tmp_path):
    save_model(tiny_model(vocab_size=256, capacity_factor=0.5), tmp_path)
    alone, _ = written(tmp_path, ["abc"])
    together, _ = written(tmp_path, ["abc"] * 5 + ["a longer one"])
    assert together.count(alone) == 5


def test_a_character_comes_when_all_its_bytes_have():
    decoding = text_of.__globals__["_Bytes"]().decoding()
    assert [decoding.push(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert decoding.push(0xC3) == ""
    assert decoding.end() == "\ufffd"


def test_tokens_that_are_decoded_one_by_one_give_the_text_of_all(word_model):
    text = text_of(word_model, None, vocab_size=6)
    decoding = text.decoding()
    parts = [decoding.push(token) for token in [0, 1, 2, 3, 0, 4, 0, 1, 2]]
    assert "".join(parts) == text.decode([0, 1, 2, 3, 0, 4, 0, 1, 2])


def test_the_precision_asked_for(byte_model):
    text, _ = written(byte_model, ["Once"], dtype="float32")
    assert text.startswith("Once")


def another_family(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    header = {"fomoe_model": '{"family": "other"}', "fomoe_format_version": "1"}
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", header)
    return folder


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (["a" * 33], {}, "prompt 1 has 33 tokens and --max-new-tokens is 8: together 41, but the "
         "model's context is 40"),
        (["a", ""], {}, "prompt 2 is empty: expected at least one token"),
        (["a"], {"cuda_graph": True}, "--cuda-graph: expected a model on one GPU"),
        (["a"], {"device": "gpu"}, "--device: expected cpu, cuda or cuda:NUMBER, got 'gpu'"),
        (["a"], {"device": "meta"}, "--device: expected cpu, cuda or cuda:NUMBER, got 'meta'"),
        (["a"], {"device": "cuda:99"}, "--device"),
    ],
)  # fmt: skip
def test_requests_that_do_not_fit_are_refused(prompts, settings, message, byte_model):
    with pytest.raises(UserError, match=message):
        written(byte_model, prompts, **settings)


def test_models_and_tokenizers_that_do_not_fit_are_refused(byte_model, word_model, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        written(tmp_path / "nowhere", ["a"])
    with pytest.raises(UserError, match="family: expected one of decoder, foe, got 'other'"):
        written(another_family(tmp_path / "other"), ["a"])
    save_model(tiny_model(vocab_size=61), tmp_path / "bare")
    with pytest.raises(UserError, match="the model's 61 tokens are not bytes: give --tokenizer"):
        written(tmp_path / "bare", ["a"])
    save_model(tiny_model(vocab_size=4), tmp_path / "small")
    with pytest.raises(UserError, match="has 6 tokens, but the model 4: it is not the model's"):
        written(tmp_path / "small", ["a"], tokenizer=word_model / "tokenizer.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="is no file of the library tokenizers"):
        written(byte_model, ["a"], tokenizer=tmp_path / "broken.json")
