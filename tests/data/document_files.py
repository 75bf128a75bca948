# SPDX-License-Identifier: Apache-2.0
"""Files of documents that the tests write, and their decoding back from tokens."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fomoe.data.documents import Documents, open_documents
from fomoe.data.sources import Source, find_files


def write_jsonl(file: Path, documents: Iterable[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


def write_parquet(file: Path, documents: Sequence[str]) -> Path:
    table = pyarrow.table({"text": list(documents), "other": list(range(len(documents)))})
    parquet.write_table(table, file, row_group_size=7)
    return file


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


def opened(path: Path, **source: str) -> Documents:
    documents = open_documents(find_files("data.sources[0]", Source(str(path), **source)))
    documents.check()
    return documents


def text(tokens: np.ndarray) -> str:
    return bytes(tokens.ravel().astype(np.uint8)).decode()


def numbered(count: int, letter: str = "d") -> list[str]:
    """d00, d01, ...: with the separator four bytes each."""
    return [f"{letter}{i:02d}" for i in range(count)]


def uneven(count: int, letter: str = "d") -> list[str]:
    """Documents of 0 to about 60 bytes that say their number again and again."""
    return [" ".join([f"{letter}{i:02d}"] * (i * 7 % 16)) for i in range(count)]


def write_tokenizer(file: Path) -> Path:
    """Words "one" (1), "two" (2), "<end>" (3, special), "far" (300), all else 0.

    It asks for truncation, padding and a template, as files of published models do.
    """
    vocabulary = {"?": 0, "one": 1, "two": 2, "<end>": 3, "far": 300}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 3)]
    )
    tokenizer.save(str(file))
    return file
