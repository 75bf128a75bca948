# SPDX-License-Identifier: Apache-2.0
"""Sequences of calibration text."""

import torch

from fomoe.convert.text import calibration_text
from fomoe.data.tokenization import ByteTokens


def text_of(paths, tokens=64, **settings):
    return calibration_text(
        paths, ByteTokens("\n"), tokens=tokens, held_out_tokens=16, sequence_length=16, **settings
    )


def test_files_take_turns_and_held_out_text_is_apart(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, letter in zip(paths, "ab", strict=True):
        path.write_text("v" * 8192 + letter * 100)  # the first block of 8192 is for validation
    text = text_of(paths)
    assert [bytes(s.tolist()).decode()[0] for s in text.training] == ["a", "b", "a", "b"]
    assert bytes(text.held_out[0].tolist()) == b"v" * 16


def test_more_tokens_change_none_of_the_first():
    few, many = text_of([], tokens=64), text_of([], tokens=128)
    assert torch.equal(many.training[:4], few.training)
    assert torch.equal(many.held_out, few.held_out)
    assert many.sha256 != few.sha256


def test_a_long_file_makes_up_for_short_ones(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, size in zip(paths, (20, 20, 40_000), strict=True):
        path.write_text("v" * 8192 + path.stem * size)
    text = text_of(paths, tokens=160 * 16)
    assert text.training.shape == (160, 16)
