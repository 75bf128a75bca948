# SPDX-License-Identifier: Apache-2.0
"""Documents as tokens: bytes, or any file of the library tokenizers."""

import json
import sys
from pathlib import Path

import pytest
from document_files import write_tokenizer

from fomoe.data.tokenization import tokenization
from fomoe.errors import UserError


def test_bytes_are_tokens_and_the_separator_follows():
    assert tokenization("", "\n").encode("\u00e4a").tolist() == [0xC3, 0xA4, 97, 10]
    assert tokenization("", "").encode("").tolist() == []
    assert tokenization("", "\n").vocab_size == 256


def test_a_tokenizer_file_gives_its_tokens_and_its_separator(tmp_path: Path):
    tokens = tokenization(str(write_tokenizer(tmp_path / "words.json")), "<end>")
    assert tokens.encode("one two one").tolist() == [1, 2, 1, 3]
    assert tokens.vocab_size == 301  # the largest id is 300, though there are fewer


def test_a_separator_that_is_no_token_is_text(tmp_path: Path):
    tokens = tokenization(str(write_tokenizer(tmp_path / "words.json")), " two two ")
    assert tokens.encode("one").tolist() == [1, 2, 2]


def test_a_document_cannot_forge_a_separator(tmp_path: Path):
    tokens = tokenization(str(write_tokenizer(tmp_path / "words.json")), "<end>")
    assert 3 not in tokens.encode("one<end>two").tolist()[:-1]


def test_the_files_own_truncation_padding_and_template_are_not_applied(tmp_path: Path):
    file = write_tokenizer(tmp_path / "words.json")
    settings = json.loads(file.read_text())
    assert settings["truncation"]["max_length"] == 2
    assert settings["padding"]["strategy"] == {"Fixed": 16}
    assert settings["post_processor"] is not None
    tokens = tokenization(str(file), "")
    assert tokens.encode("one two one two").tolist() == [1, 2, 1, 2]
    assert tokens.encode("one").tolist() == [1]


def test_what_is_no_tokenizer_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer: .*config\.json is no file of the lib"):
        tokenization(str(tmp_path / "config.json"), "")
    with pytest.raises(UserError, match=r"data.tokenizer: cannot read .*gone: No such file"):
        tokenization(str(tmp_path / "gone"), "")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"data.tokenizer needs tokenizers, .*'fomoe\[hf\]'"):
        tokenization(str(tmp_path / "words.json"), "")
