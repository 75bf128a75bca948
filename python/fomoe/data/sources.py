# SPDX-License-Identifier: Apache-2.0
"""Sources of documents: the files behind a `[[data.sources]]` table, and what identifies them."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fomoe.data.corpus import TEXT_SUFFIXES
from fomoe.errors import UserError

__all__ = ["Format", "Source", "SourceFiles", "find_files"]

Format = Literal["text", "jsonl", "parquet"]

_SUFFIXES: dict[Format, frozenset[str]] = {
    "text": TEXT_SUFFIXES,
    "jsonl": frozenset([".jsonl", ".ndjson"]),
    "parquet": frozenset([".parquet"]),
}
_DIGESTED = 1 << 20


@dataclass(frozen=True)
class Source:
    """What the settings say of a source.

    `path` is a file or folder, `weight` its relative share of the sequences, `format` one of the
    formats or "auto" (by suffix), `field` the key of a JSON line, or the column of a parquet file,
    that holds a document.
    """

    path: str
    weight: float = 1.0
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    field: str = "text"


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source, in the order they are read; `label` names its table in errors."""

    label: str
    source: Source
    format: Format
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, of all files."""
        return sum(self._size(file) for file in self.files)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) over every file's name, size, first and last MiB (our choice).

        Cheap for files of any size. It notices files that are added, missing, renamed, extended or
        cut; of a change that keeps the size only what touches the two ends, which in a parquet file
        hold the place and statistics of every part.
        """
        digest = hashlib.sha256()
        root = Path(self.source.path)
        for file in self.files:
            name = file.relative_to(root).as_posix() if file != root else ""
            size = self._size(file)
            digest.update(f"{name}\0{size}\0".encode())
            with self._readable(file).open("rb") as opened:
                digest.update(opened.read(_DIGESTED))
                opened.seek(max(_DIGESTED, size - _DIGESTED))
                digest.update(opened.read(_DIGESTED))
        return digest.hexdigest()

    def _size(self, file: Path) -> int:
        return self._readable(file).stat().st_size

    def _readable(self, file: Path) -> Path:
        if not os.access(file, os.R_OK):
            raise UserError(f"{self.label}: cannot read {file}: it is gone or may not be read")
        return file


def find_files(label: str, source: Source) -> SourceFiles:
    """Lists a source's files and settles its format.

    A folder contributes its files with a suffix of the format, recursively, in sorted order, hidden
    ones left out; a file that is named itself has any suffix when the format is set. JSON lines may
    be compressed (`.jsonl.gz`).

    Raises
    ------
    UserError
        The path is missing, a file is empty or unreadable, the folder holds none of the format or
        files of several, or the suffix tells no format.
    """
    path = Path(source.path)
    if not path.exists():
        raise UserError(f"{label}: {path} does not exist")
    files = tuple(_walk(label, path)) if path.is_dir() else (path,)
    chosen, kind = _choose(label, source, files)
    if kind == "text" and source.field != Source.field:
        raise UserError(
            f"{label}: field = {source.field!r} has no meaning for {path}, whose format is text"
        )
    found = SourceFiles(label, source, kind, chosen)
    for file in chosen:
        if not found._size(file):
            raise UserError(f"{label}: {file} is empty")
    return found


def _choose(label: str, source: Source, files: tuple[Path, ...]) -> tuple[tuple[Path, ...], Format]:
    path = Path(source.path)
    if source.format != "auto" and not path.is_dir():
        return files, source.format
    by_format: dict[Format, list[Path]] = {}
    for file in files:
        for kind, suffixes in _SUFFIXES.items():
            if _suffix(file) in suffixes and source.format in ("auto", kind):
                by_format.setdefault(kind, []).append(file)
    if len(by_format) == 1:
        ((kind, chosen),) = by_format.items()
        return tuple(chosen), kind
    if by_format:
        raise UserError(
            f"{label}: folder {path} holds files of several formats ({', '.join(by_format)}): "
            "set format to one of them"
        )
    if not path.is_dir():
        raise UserError(
            f"{label}: the suffix of {path} tells no format: "
            "set format to 'text', 'jsonl' or 'parquet'"
        )
    wanted = "text, jsonl or parquet" if source.format == "auto" else source.format
    raise UserError(f"{label}: folder {path} holds no {wanted} file")


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return Path(
        name.removesuffix(".gz") if name.endswith((".jsonl.gz", ".ndjson.gz")) else name
    ).suffix


def _walk(label: str, folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{label}: cannot read folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
