# SPDX-License-Identifier: Apache-2.0
"""Documents of a source, one after the other, without ever holding a whole file.

JSON lines are streamed through the library `datasets`. A line is decoded here, not there: only the
one field is looked at, so other fields may change their type from line to line, and a mistake is
named with its line. Parquet is read with `pyarrow`, which `datasets` stands on, because `datasets`
holds a row group as a whole, and most files have one only: for a file of 196 MB its reader took 890
MB and 7.8 s, this one 27 MB and 1.4 s.
"""

import glob
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fomoe.data.sources import SourceFiles
from fomoe.errors import UserError

__all__ = ["TEXT_PIECE", "Documents", "open_documents"]

TEXT_PIECE = 1 << 16
"""Bytes of a document of a text file, about: it ends at a line end near that size, if any."""

_LINE_END_WITHIN = 1 << 12
_ROWS = 256  # decoded at a time
_BUFFER = 1 << 20


class Documents(Protocol):
    """The documents of a source, by file and row."""

    source: SourceFiles

    def check(self) -> None:
        """Raise UserError now for files whose beginning shows that they cannot be read."""
        ...

    def rows(self, file: int, start: int) -> Iterator[Any]:
        """Rows of a file from 0-based row `start` on, not yet decoded."""
        ...

    def text(self, file: int, row: int, content: Any) -> str | None:
        """The document in that row; None for a blank line, which holds none."""
        ...


def open_documents(source: SourceFiles) -> Documents:
    """The reader for the source's format.

    Raises
    ------
    UserError
        The format needs the extra `hf`, which is not installed.
    """
    if source.format == "text":
        return _TextDocuments(source)
    _import_datasets(source)
    return _ParquetDocuments(source) if source.format == "parquet" else _JsonDocuments(source)


class _TextDocuments:
    """Pieces of UTF-8 files. Where a piece begins depends on its number and the bytes there."""

    def __init__(self, source: SourceFiles) -> None:
        self.source = source

    def check(self) -> None:
        for file in range(len(self.source.files)):
            self.text(file, 0, next(self.rows(file, 0)))

    def rows(self, file: int, start: int) -> Iterator[bytes]:
        path = self.source.files[file]
        try:
            with path.open("rb") as opened:
                for row in itertools.count(start):
                    first = max(0, row * TEXT_PIECE - _LINE_END_WITHIN)
                    opened.seek(first)
                    block = opened.read((row + 1) * TEXT_PIECE + 1 - first)
                    if first + len(block) <= row * TEXT_PIECE:
                        return
                    begin = _piece_begin(block, row * TEXT_PIECE - first)
                    yield block[begin : _piece_begin(block, (row + 1) * TEXT_PIECE - first)]
        except OSError as error:
            raise UserError(f"{self.source.label}: cannot read {path}: {error.strerror}") from error

    def text(self, file: int, row: int, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.source.label}: {self.source.files[file]} is not UTF-8: byte "
                f"0x{content[error.start]:02x} near offset {row * TEXT_PIECE + error.start}"
            ) from None


class _JsonDocuments:
    """One JSON object per line."""

    def __init__(self, source: SourceFiles) -> None:
        self.source = source

    def check(self) -> None:
        for file in range(len(self.source.files)):
            for row, content in enumerate(self.rows(file, 0)):
                if self.text(file, row, content) is not None:
                    break

    def rows(self, file: int, start: int) -> Iterator[str]:
        path = self.source.files[file]
        # Not load_dataset: it reports every use over the network.
        from_text = _import_datasets(self.source).from_text
        with _reading(self.source, path):
            # It keeps a lock file where it would cache, which nothing here needs later.
            with tempfile.TemporaryDirectory(prefix="fomoe-", ignore_cleanup_errors=True) as cache:
                stream = from_text(
                    glob.escape(str(path.resolve())), cache_dir=cache, chunksize=_BUFFER
                )
            tables = stream.with_format("arrow").iter(batch_size=_ROWS)
            yield from _from_row(start, (table.column("text") for table in tables))

    def text(self, file: int, row: int, content: str) -> str | None:
        if not content.strip():
            return None
        place = f"{self.source.label}: {self.source.files[file]} line {row + 1}"
        # A byte order mark is legal nowhere but common at the start of a file.
        content = content.removeprefix("\ufeff") if row == 0 else content
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{place}: expected a JSON object, got {_json_type(value)}")
        field = self.source.source.field
        if field not in value:
            known = ", ".join(map(repr, itertools.islice(value, 8))) or "none"
            raise UserError(f"{place} has no field {field!r}; its fields: {known}")
        return _unicode(place, field, value[field])


class _ParquetDocuments:
    """One row per document; only the one column is read."""

    def __init__(self, source: SourceFiles) -> None:
        self.source = source

    def check(self) -> None:
        import pyarrow
        from pyarrow import parquet, types

        field = self.source.source.field
        for path in self.source.files:
            try:
                schema = parquet.read_schema(path)
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"{self.source.label}: cannot read {path} as parquet: {reason}"
                ) from None
            if field not in schema.names:
                known = ", ".join(map(repr, schema.names[:8]))
                raise UserError(
                    f"{self.source.label}: {path} has no column {field!r}; its columns: {known}"
                )
            kind = schema.field(field).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise UserError(
                    f"{self.source.label}: column {field!r} of {path} has type {kind}, "
                    "expected string"
                )

    def rows(self, file: int, start: int) -> Iterator[Any]:
        from pyarrow import parquet

        path = self.source.files[file]
        with (
            _reading(self.source, path),
            parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as opened,
        ):
            metadata = opened.metadata
            group = 0
            while group < metadata.num_row_groups and start >= metadata.row_group(group).num_rows:
                start -= metadata.row_group(group).num_rows
                group += 1
            batches = opened.iter_batches(
                _ROWS,
                row_groups=range(group, metadata.num_row_groups),
                columns=[self.source.source.field],
            )
            yield from _from_row(start, (batch.column(0) for batch in batches))

    def text(self, file: int, row: int, content: Any) -> str:
        place = f"{self.source.label}: {self.source.files[file]} row {row}"
        return _unicode(place, self.source.source.field, content)


def _from_row(start: int, columns: Iterable[Any]) -> Iterator[Any]:
    """Values of arrow columns, one after the other, without the first `start`."""
    for column in columns:
        if start < len(column):
            yield from column.slice(start).to_pylist()
        start = max(0, start - len(column))


@contextmanager
def _reading(source: SourceFiles, path: Path) -> Iterator[None]:
    """Says in a sentence what a library that reads the file has to say."""
    try:
        yield
    except Exception as error:  # the types are those of whichever library reads the format
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{source.label}: cannot read {path}: {reason}") from error


def _import_datasets(source: SourceFiles) -> Any:
    try:
        from datasets import IterableDataset
    except ImportError:
        raise UserError(
            f"{source.label}: reading {source.source.path} as {source.format} needs datasets, "
            "which is not installed: pip install 'fomoe[hf]'"
        ) from None
    return IterableDataset


def _piece_begin(block: bytes, index: int) -> int:
    """Where the piece that nominally begins at `index` does: after a line end, else a character."""
    if index <= 0 or index >= len(block):
        return min(max(0, index), len(block))
    line_end = block.rfind(b"\n", max(0, index - _LINE_END_WITHIN), index)
    if line_end >= 0:
        return line_end + 1
    for back in range(min(4, index)):
        if block[index - back] & 0xC0 != 0x80:
            return index - back
    return index


def _unicode(place: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} is {_json_type(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field {field!r} holds half a character, U+{ord(value[error.start]):04X}"
        ) from None
    return value


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"
