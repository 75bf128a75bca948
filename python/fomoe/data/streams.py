# SPDX-License-Identifier: Apache-2.0
"""The tokens of one reader of a source, document after document, and where it stands.

Documents are numbered from 0 within an epoch, in the order of the files. Document i belongs to
validation when i % 20 == 0 (our choice); the others, numbered anew, are dealt to the source's R
readers in turn: training document j to reader j % R. A reader joins its documents, each with the
separator behind it, and goes on with the next epoch without a gap, so nothing is left out.

The state of a reader is the place of its next token: epoch, file, row, number of the document and
offset in its tokens. When R changes, all new readers start at the least of the old places and leave
out what any old reader has begun (`deal_again`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fomoe.data.documents import Documents
from fomoe.data.tokenization import Tokenization
from fomoe.errors import UserError

__all__ = ["TokenStream", "check_documents", "deal_again", "validation_tokens"]

_VALIDATION_EVERY = 20
Tokens = npt.NDArray[np.integer[Any]]


class _Place(NamedTuple):
    """Of a document; `document` is its number in the epoch, validation counted too."""

    epoch: int
    file: int
    row: int
    document: int


class TokenStream:
    """Training tokens of reader `rank` of `num_ranks`, without end.

    `state` is an earlier one's `state()`, or what `deal_again` gives; None: from the start.
    """

    def __init__(
        self,
        documents: Documents,
        tokenization: Tokenization,
        *,
        rank: int,
        num_ranks: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._documents = documents
        self._tokenization = tokenization
        self._rank = rank
        self._num_ranks = num_ranks
        self._past: list[list[list[int]]] = [] if state is None else state["past"]
        self._next = _Place(0, 0, 0, 0) if state is None else _place(state)
        self._reader = self._read()
        self._current: tuple[_Place, Tokens] | None = None
        self._offset = 0
        if state is not None and state["offset"]:
            self._current = next(self._reader)
            self._offset = state["offset"]

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """The next tokens, int64 (count,).

        Raises
        ------
        UserError
            A document cannot be read, or the source has none for this reader.
        """
        taken = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            if self._current is None:
                self._current, self._offset = next(self._reader), 0
            tokens = self._current[1]
            piece = tokens[self._offset : self._offset + count - filled]
            taken[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._offset += len(piece)
            if self._offset >= len(tokens):
                self._current = None
        return taken

    def state(self) -> dict[str, Any]:
        """Where the next token is, as JSON-able values."""
        place, offset = (self._next, 0)
        if self._current is not None:
            place, offset = self._current[0], self._offset
        return {**place._asdict(), "offset": offset, "past": self._past}

    def _read(self) -> Iterator[tuple[_Place, Tokens]]:
        epoch, file, row, document = self._next
        while True:
            whole, useful = document == 0, False
            while file < len(self._documents.source.files):
                for content in self._documents.rows(file, row):
                    place = _Place(epoch, file, row, document)
                    row, document = row + 1, document + 1
                    self._next = _Place(epoch, file, row, document)
                    if not self._is_mine(place):
                        continue
                    if self._is_past(place):
                        useful = True
                        continue
                    tokens = _encode(self._documents, self._tokenization, place, content)
                    if len(tokens):
                        useful = True
                        yield place, tokens
                file, row = file + 1, 0
            if whole and not useful:
                raise _too_few(self._documents, self._num_ranks)
            epoch, file, row, document = epoch + 1, 0, 0, 0

    def _is_mine(self, place: _Place) -> bool:
        return (
            not _is_validation(place.document)
            and _training_number(place.document) % self._num_ranks == self._rank
        )

    def _is_past(self, place: _Place) -> bool:
        number = _training_number(place.document)
        here = [place.epoch, place.document]
        return any(here < begun[number % len(begun)] for begun in self._past)


def deal_again(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state every reader starts from when another number of them goes on.

    `states` are those of all readers so far, by rank. Of an epoch, no document that one of them has
    begun is read again, every other one is; what was left of a document that was begun (at most
    one per reader) is left out.
    """
    start = min(map(_place, states), key=lambda place: (place.epoch, place.document))
    # [epoch, document] per rank: its documents before that have been begun.
    begun = [[state["epoch"], state["document"] + (state["offset"] > 0)] for state in states]
    past = [
        each for each in [*states[0]["past"], begun] if max(each) > [start.epoch, start.document]
    ]
    return {**start._asdict(), "offset": 0, "past": past}


def check_documents(documents: Documents, num_ranks: int) -> None:
    """Looks whether every one of `num_ranks` readers finds a training document.

    Raises
    ------
    UserError
        There are fewer, or the first ones cannot be read.
    """
    found, document = 0, 0
    for file in range(len(documents.source.files)):
        for row, content in enumerate(documents.rows(file, 0)):
            if not _is_validation(document) and documents.text(file, row, content) is not None:
                found += 1
                if found == num_ranks:
                    return
            document += 1
    raise _too_few(documents, num_ranks)


def validation_tokens(
    documents: Documents, tokenization: Tokenization, *, num_windows: int, width: int
) -> npt.NDArray[np.int64]:
    """The first windows of the validation documents, int64 (up to `num_windows`, `width`).

    Raises
    ------
    UserError
        They do not fill one window.
    """
    found: list[Tokens] = []
    size = 0
    for tokens in _validation_documents(documents, tokenization):
        found.append(tokens)
        size += len(tokens)
        if size >= num_windows * width:
            break
    if size < width:
        source = documents.source
        raise UserError(
            f"{source.label}: the validation documents of {source.source.path} (every "
            f"{_VALIDATION_EVERY}th, from the first on) hold {size} tokens, too few for one "
            f"window of training.sequence_length + 1 = {width}"
        )
    count = min(num_windows, size // width)
    return np.concatenate(found)[: count * width].astype(np.int64).reshape(count, width)


def _validation_documents(documents: Documents, tokenization: Tokenization) -> Iterator[Tokens]:
    document = 0
    for file in range(len(documents.source.files)):
        for row, content in enumerate(documents.rows(file, 0)):
            if _is_validation(document):
                yield _encode(documents, tokenization, _Place(0, file, row, document), content)
            document += 1


def _encode(
    documents: Documents, tokenization: Tokenization, place: _Place, content: Any
) -> Tokens:
    text = documents.text(place.file, place.row, content)
    return np.empty(0, dtype=np.int64) if text is None else tokenization.encode(text)


def _is_validation(document: int) -> bool:
    return document % _VALIDATION_EVERY == 0


def _training_number(document: int) -> int:
    """j of document i: its number among the training documents."""
    return document - document // _VALIDATION_EVERY - 1


def _place(state: Mapping[str, Any]) -> _Place:
    return _Place(*(state[name] for name in _Place._fields))


def _too_few(documents: Documents, num_ranks: int) -> UserError:
    source = documents.source
    return UserError(
        f"{source.label}: {source.source.path} has too few training documents: each of the "
        f"{num_ranks} site(s) that read it needs one with text (every {_VALIDATION_EVERY}th, from "
        "the first on, is for validation)"
    )
