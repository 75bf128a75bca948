# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, lines that are appended, and errors that name the file."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from fomoe.errors import UserError

__all__ = [
    "JsonLines",
    "cannot",
    "make_folder",
    "sync_file",
    "sync_folder",
    "write_text",
    "write_whole",
]


@contextmanager
def cannot(deed: str) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: ``cannot <deed>: <the system's reason>``.

    And what safetensors raises in its place, for a full disk or a damaged file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {deed}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"cannot {deed}: {error}") from error


_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a hidden file beside ``path``, sync it, rename it, and sync the folder.

    Missing folders are made. When ``write`` raises, ``path`` is as it was and nothing is left.

    Raises
    ------
    OSError
        The file cannot be written, or ``path`` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        write(partial)
        partial.chmod(0o666 & ~_UMASK)  # safetensors gives files to their owner alone
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing; the new names are on disk then.

    Raises
    ------
    OSError
        It cannot be made, or ``path`` is a file.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Return when the file's content is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the folder's names are on disk: before, a new name may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonLines:
    """A file of one JSON object per line, open for appending; each line is written at once.

    The file's name is on disk when it is open, its lines are after :meth:`sync`.

    Raises
    ------
    UserError
        The file cannot be opened or written; it is named.
    """

    def __init__(self, path: Path, *, anew: bool) -> None:
        self.path = path
        with self._named_error():
            # Unbuffered: what a full disk refuses must fail here, not again when the file closes.
            self._file = path.open("wb" if anew else "ab", buffering=0)
            sync_folder(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(values).encode() + b"\n")
        with self._named_error():
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Return when all lines are on disk."""
        with self._named_error():
            os.fsync(self._file.fileno())

    def _named_error(self) -> Any:
        return cannot(f"write {self.path}")
