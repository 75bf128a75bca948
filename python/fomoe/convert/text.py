# SPDX-License-Identifier: Apache-2.0
"""Calibration text as sequences of the model's own tokens."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fomoe.data import load_corpus
from fomoe.data.tokenization import Tokenization
from fomoe.errors import UserError

_BYTES_OF_TOKEN = 8  # enough: text of any kind has fewer on average


class CalibrationText(NamedTuple):
    """``training`` and ``held_out`` (N, S) int64; ``sha256`` identifies both."""

    training: Tensor
    held_out: Tensor
    sha256: str


def calibration_text(
    paths: Sequence[str | Path],
    tokenization: Tokenization,
    *,
    tokens: int,
    held_out_tokens: int,
    sequence_length: int,
) -> CalibrationText:
    """Sequences from files or folders, by default the standard library's text.

    Domains (see :func:`fomoe.data.load_corpus`) take turns, each from its beginning, so that
    adding tokens changes none of those that were there. Held-out sequences come from the corpus's
    validation blocks. Both counts are rounded up to whole sequences.

    Raises
    ------
    UserError
        If the text is too short, or cannot be read.
    """
    corpus = load_corpus(paths)
    parts = [
        [domain.training.tobytes() for domain in corpus.domains],
        [domain.validation.tobytes() for domain in corpus.domains],
    ]
    training, held_out = (
        _sequences(texts, tokenization, count, sequence_length, what)
        for texts, count, what in zip(
            parts, (tokens, held_out_tokens), ("--tokens", "held_out_tokens"), strict=True
        )
    )
    digest = hashlib.sha256(training.numpy().tobytes() + held_out.numpy().tobytes())
    return CalibrationText(training, held_out, digest.hexdigest())


def _sequences(
    texts: Sequence[bytes], tokenization: Tokenization, count: int, length: int, what: str
) -> Tensor:
    num_sequences = -(-count // length)
    each = -(-num_sequences // len(texts))
    turns = _turns(texts, tokenization, each, length)
    while len(turns) < num_sequences and each * length * _BYTES_OF_TOKEN < max(map(len, texts)):
        each *= 2  # long domains make up for short ones
        turns = _turns(texts, tokenization, each, length)
    if len(turns) < num_sequences:
        raise UserError(
            f"{what}: expected at most {len(turns) * length}, what the text has in sequences of "
            f"{length} tokens, got {count}; name more text with --data"
        )
    return torch.stack(turns[:num_sequences])


def _turns(
    texts: Sequence[bytes], tokenization: Tokenization, each: int, length: int
) -> list[Tensor]:
    """About so many sequences of each text, in turns."""
    by_domain = [
        _cut(tokenization.encode(_beginning(text, each * length)), length) for text in texts
    ]
    return [
        sequences[turn]
        for turn in range(max(map(len, by_domain)))
        for sequences in by_domain
        if turn < len(sequences)
    ]


def _beginning(text: bytes, tokens: int) -> str:
    return text[: tokens * _BYTES_OF_TOKEN].decode("utf-8", errors="ignore")


def _cut(tokens: npt.NDArray[Any], length: int) -> Tensor:
    num_sequences = len(tokens) // length
    whole = torch.from_numpy(tokens[: num_sequences * length].astype(np.int64))
    return whole.view(num_sequences, length)
