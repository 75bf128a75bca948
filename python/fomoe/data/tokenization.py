# SPDX-License-Identifier: Apache-2.0
"""How documents become tokens: UTF-8 bytes, or a file of the library `tokenizers`."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.errors import UserError

__all__ = ["ByteTokens", "FileTokens", "Tokenization", "tokenization"]


class ByteTokens:
    """Every byte is a token."""

    unit = "byte"
    vocab_size = 256
    sha256 = ""

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def encode(self, document: str) -> npt.NDArray[np.integer[Any]]:
        """Tokens (n,) of the document and the separator after it."""
        return np.frombuffer((document + self._separator).encode("utf-8"), dtype=np.uint8)


class FileTokens:
    """The tokens of a `tokenizer.json`.

    Special tokens written out in a document are encoded as the text they are, so that no document
    can forge a separator. `separator` is one special token when the vocabulary has it as a token,
    else text encoded like any other.
    """

    unit = "token"

    def __init__(self, path: str, separator: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(
                "data.tokenizer needs tokenizers, which is not installed: pip install 'fomoe[hf]'"
            ) from None
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"data.tokenizer: cannot read {path}: {error.strerror}") from None
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"data.tokenizer: {path} is no file of the library tokenizers: {error}"
            ) from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        token = self._tokenizer.token_to_id(separator)
        self._separator: list[int] = self._encode(separator) if token is None else [token]

    def encode(self, document: str) -> npt.NDArray[np.integer[Any]]:
        """Tokens (n,) of the document and the separator after it."""
        return np.array(self._encode(document) + self._separator, dtype=np.int64)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


Tokenization = ByteTokens | FileTokens


def tokenization(path: str, separator: str) -> Tokenization:
    """Reads the tokenizers file `path`; bytes where it is "".

    Raises
    ------
    UserError
        The file is missing or of another kind, or the extra `hf` is not installed.
    """
    return FileTokens(path, separator) if path else ByteTokens(separator)
