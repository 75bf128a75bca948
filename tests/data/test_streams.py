# SPDX-License-Identifier: Apache-2.0
"""Token streams: who reads which document, where a reader stands, and a changed number of them."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from document_files import WRITERS, numbered, opened, text, uneven, write_jsonl

from fomoe.data.documents import Documents
from fomoe.data.streams import TokenStream, check_documents, deal_again, validation_tokens
from fomoe.data.tokenization import ByteTokens
from fomoe.errors import UserError

BYTES = ByteTokens("\n")


def streams(documents: Documents, num_ranks: int, states: Sequence[Any] = ()) -> list[TokenStream]:
    return [
        TokenStream(
            documents,
            BYTES,
            rank=rank,
            num_ranks=num_ranks,
            state=json.loads(json.dumps(states[rank])) if states else None,
        )
        for rank in range(num_ranks)
    ]


def training(documents: Sequence[str]) -> list[str]:
    return [each for i, each in enumerate(documents) if i % 20]


def test_documents_are_dealt_in_turn_worked_by_hand(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", numbered(24)))  # 0 and 20: validation
    first, second = streams(documents, 2)
    assert text(first.take(16)) == "d01\nd03\nd05\nd07\n"
    assert text(second.take(38)) == "d02\nd04\nd06\nd08\nd10\nd12\nd14\nd16\nd18\nd2"
    assert text(second.take(10)) == "1\nd23\nd02\n"  # d21 is number 19: then the next epoch
    windows = validation_tokens(documents, BYTES, num_windows=9, width=3)
    assert [text(window) for window in windows] == ["d00", "\nd2"]


@pytest.mark.parametrize("num_ranks", [1, 3, 19, 20])
def test_every_training_document_is_read_once_an_epoch_by_one_reader(
    tmp_path: Path, num_ranks: int
):
    for part in range(3):  # three files: 60 documents
        names = numbered(60)[part * 20 : part * 20 + 20]
        write_jsonl(tmp_path / f"{part}.jsonl", names)
    documents = opened(tmp_path)
    each = {rank: len(range(rank, 57, num_ranks)) for rank in range(num_ranks)}
    readers = streams(documents, num_ranks)
    for _epoch in range(2):
        read = [
            name
            for rank, stream in enumerate(readers)
            for name in text(stream.take(4 * each[rank])).split()
        ]
        assert Counter(read) == Counter(training(numbered(60)))


@pytest.mark.parametrize("format", [*WRITERS, "text"])
def test_a_stream_goes_on_exactly_from_any_place(tmp_path: Path, format: str):
    if format == "text":
        lines = (f"{i} {'x' * (i % 90)}\n" for i in range(6000))
        (tmp_path / "a.txt").write_text("".join(lines))
        documents, width, count = opened(tmp_path), 40_000, 9
    else:
        WRITERS[format](tmp_path / f"0.{format}", uneven(23))
        WRITERS[format](tmp_path / f"1.{format}", ["short", "long " * 40, "end"])
        documents, width, count = opened(tmp_path), 47, 40
    for rank in range(2):
        whole = streams(documents, 2)[rank]
        states, windows = [], []
        for _ in range(count):
            states.append(json.dumps(whole.state()))
            windows.append(whole.take(width))
        assert whole.state()["epoch"] > 0
        for k in range(0, count, 3):
            again = TokenStream(
                documents, BYTES, rank=rank, num_ranks=2, state=json.loads(states[k])
            )
            for window, state in zip(windows[k : k + 4], states[k : k + 4], strict=False):
                assert json.dumps(again.state()) == state
                np.testing.assert_array_equal(again.take(width), window)


@pytest.mark.parametrize("seed", range(6))
def test_when_readers_change_no_begun_document_comes_again_and_no_other_is_lost(
    tmp_path: Path, seed: int
):
    draw = random.Random(seed)
    names = numbered(90)
    documents = opened(
        write_jsonl(tmp_path / "a.jsonl", [" ".join([n] * draw.randint(2, 9)) for n in names])
    )
    seen: list[str] = []
    state = None
    for num_ranks in (draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 4)):
        readers = streams(documents, num_ranks, [state] * num_ranks if state else ())
        for reader in readers:
            # Whole words of four bytes: a reader stops inside a document, never inside a word.
            words = text(reader.take(4 * draw.randint(0, 35))).split()
            seen += dict.fromkeys(words)
        state = deal_again([reader.state() for reader in readers])
    assert len(seen) == len(set(seen)), "a document was begun twice"
    rest: list[str] = []
    last = streams(documents, 2, [state, state])
    for reader in last:
        while reader.state()["epoch"] == 0:
            rest += dict.fromkeys(text(reader.take(4)).split())
    assert training(names) == sorted({*seen, *rest})
    # A reader is past the end of the epoch only with the first word of the next one.
    assert len({*rest} & {*seen}) <= 2


def test_readers_in_different_epochs_are_dealt_anew_without_repetition(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", numbered(21)))  # d01 ... d19
    fast, slow = streams(documents, 2)
    assert text(fast.take(48)).split()[-2:] == ["d01", "d03"]  # ten of its own, then epoch 1
    assert text(slow.take(8)).split() == ["d02", "d04"]
    (alone,) = streams(documents, 1, [deal_again([fast.state(), slow.state()])])
    assert text(alone.take(28)).split() == [f"d{i:02d}" for i in (6, 8, 10, 12, 14, 16, 18)]
    assert text(alone.take(16)).split() == ["d02", "d04", "d05", "d06"]  # epoch 1, less two


def test_the_rest_of_a_document_that_was_begun_is_left_out(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", numbered(21)))
    (alone,) = streams(documents, 1)
    assert text(alone.take(6)) == "d01\nd0"
    state = deal_again([alone.state()])
    first, second = streams(documents, 2, [state, state])
    assert text(first.take(8)) == "d03\nd05\n"
    assert text(second.take(8)) == "d04\nd06\n"


def test_a_source_without_a_document_for_every_reader_is_refused(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", numbered(4)))
    check_documents(documents, 3)
    with pytest.raises(UserError, match=r"sources\[0\]: .* too few .* each of the 4 site"):
        check_documents(documents, 4)
    with pytest.raises(UserError, match="too few training documents"):
        streams(documents, 4)[3].take(1)


def test_documents_without_any_token_are_refused_instead_of_read_for_ever(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", [""] * 9))
    stream = TokenStream(documents, ByteTokens(""), rank=0, num_ranks=1)
    with pytest.raises(UserError, match="too few training documents"):
        stream.take(1)


def test_too_little_for_one_validation_window_is_refused(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", numbered(30)))
    with pytest.raises(UserError, match=r"hold 8 tokens, too few .*sequence_length \+ 1 = 9"):
        validation_tokens(documents, BYTES, num_windows=1, width=9)
