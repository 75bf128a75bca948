# SPDX-License-Identifier: Apache-2.0
"""Between text and tokens: a `tokenizer.json`, or UTF-8 bytes for a vocabulary of 256."""

import codecs
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fomoe.errors import UserError

__all__ = ["Decoding", "Text", "text_of"]

_REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to


class Decoding(Protocol):
    """Tokens to text, as they come."""

    def push(self, token: int) -> str:
        """What the token adds to the text; characters come when they are complete."""
        ...

    def end(self) -> str:
        """What is left of an incomplete character."""
        ...


class Text(Protocol):
    """A vocabulary; ``stop_tokens`` are those that end a text."""

    vocab_size: int
    stop_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]: ...

    def decoding(self, before: Sequence[int] = ()) -> Decoding:
        """Of what follows the tokens ``before``."""
        ...


def text_of(folder: Path, tokenizer: Path | None, vocab_size: int, separator: str = "") -> Text:
    """The vocabulary of a model: of the ``tokenizer`` given, or of ``tokenizer.json`` beside it.

    Bytes, where there is none and the model has 256 tokens. A special token ``separator`` ends a
    text as well.

    Raises
    ------
    UserError
        There is none, it cannot be read, or has more tokens than the model.
    """
    path = tokenizer if tokenizer is not None else folder / "tokenizer.json"
    if tokenizer is None and not path.is_file():
        if vocab_size == 256:
            return _Bytes()
        raise UserError(
            f"{folder} has no tokenizer.json, and the model's {vocab_size} tokens are not bytes: "
            "give --tokenizer"
        )
    text = _File(path, separator)
    if text.vocab_size > vocab_size:
        raise UserError(
            f"{path} has {text.vocab_size} tokens, but the model {vocab_size}: "
            "it is not the model's tokenizer"
        )
    return text


class _Bytes:
    vocab_size = 256
    stop_tokens: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decoding(self, before: Sequence[int] = ()) -> Decoding:
        return _BytesDecoding()


class _BytesDecoding:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _File:
    """A file of the library tokenizers, and what ``tokenizer_config.json`` says of its end."""

    def __init__(self, path: Path, separator: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(
                "a tokenizer.json needs tokenizers, which is not installed: pip install 'fomoe[hf]'"
            ) from None
        try:
            self.tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path} is no file of the library tokenizers: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        ends = self._end_tokens(path.parent)
        added = self.tokenizer.get_added_tokens_decoder().items()
        ends += [number for number, token in added if token.content == separator]
        self.stop_tokens = frozenset(ends)

    def _end_tokens(self, folder: Path) -> list[int]:
        names, ids = [], []
        for file in ("tokenizer_config.json", "generation_config.json"):
            try:
                settings = json.loads((folder / file).read_bytes())
            except (OSError, ValueError):
                continue
            name, given = settings.get("eos_token"), settings.get("eos_token_id", [])
            names.append(name.get("content") if isinstance(name, dict) else name)
            ids += given if isinstance(given, list) else [given]
        found = [self.tokenizer.token_to_id(name) for name in names if isinstance(name, str)]
        return [token for token in [*found, *ids] if isinstance(token, int)]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens))
        return text

    def decoding(self, before: Sequence[int] = ()) -> Decoding:
        return _FileDecoding(self, before)


class _FileDecoding:
    """Decodes the last few tokens anew each time: a token's text depends on those before it.

    What is decoded begins with a whole character: a tokenizer that falls back to bytes makes
    nothing but replacements of a row of bytes of which one is missing.
    """

    _CONTEXT = 6

    def __init__(self, file: _File, before: Sequence[int]) -> None:
        self._file = file
        self._pending: list[int] = []
        self._said = [self._whole_characters(before)]
        """Tokens that make whole characters each, the last few."""

    def push(self, token: int) -> str:
        self._pending.append(token)
        text = self._added()
        if text.endswith(_REPLACEMENT):
            return ""
        self._said = [*self._said, self._pending][-self._CONTEXT :]
        self._pending = []
        return text

    def end(self) -> str:
        return self._added() if self._pending else ""

    def _added(self) -> str:
        said = list(itertools.chain.from_iterable(self._said))
        return self._file.decode(said + self._pending)[len(self._file.decode(said)) :]

    def _whole_characters(self, tokens: Sequence[int]) -> list[int]:
        """The last few tokens, and those before that the first character begins with."""
        for more in range(4):  # no character has more than four bytes
            few = list(tokens[-self._CONTEXT - more :])
            if _REPLACEMENT not in self._file.decode(few):
                return few
        return list(tokens[-self._CONTEXT :])
