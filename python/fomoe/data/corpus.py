# SPDX-License-Identifier: Apache-2.0
"""Corpora of UTF-8 text as bytes: the user's files, or the text that every Python brings along.

A corpus is a tuple of named domains. Each domain is cut into blocks of 8192 bytes; block i belongs
to validation when i % 20 == 0 and to training otherwise (our choice: block 0 counts, so that a
short text has both). Blocks may cut a character: the tokens are bytes. The two parts are the
concatenations of their blocks.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fomoe.errors import UserError

__all__ = ["TEXT_SUFFIXES", "Corpus", "Domain", "load_corpus"]

TEXT_SUFFIXES = frozenset(
    [
        ".c",
        ".cc",
        ".cpp",
        ".cu",
        ".go",
        ".h",
        ".hpp",
        ".html",
        ".java",
        ".js",
        ".md",
        ".py",
        ".rs",
        ".rst",
        ".tex",
        ".ts",
        ".txt",
    ]
)
"""Files a folder contributes; a file that is named itself is read whatever its suffix."""

_BLOCK = 8192
_VALIDATION_EVERY = 20
# pydoc_data is the prose domain; _sysconfigdata_* is generated and differs per machine.
_SKIPPED_PACKAGES = {
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_SKIPPED_FOLDERS = {"test", "tests", "__pycache__"}


@dataclass(frozen=True, eq=False)
class Domain:
    """One named text: `data`, its bytes."""

    name: str
    data: bytes

    @cached_property
    def training(self) -> npt.NDArray[np.uint8]:
        """Bytes of the training blocks, uint8 (n,)."""
        return _split(self.data, validation=False)

    @cached_property
    def validation(self) -> npt.NDArray[np.uint8]:
        """Bytes of the validation blocks, uint8 (n,)."""
        return _split(self.data, validation=True)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in one or more domains, in the order of the settings."""

    domains: tuple[Domain, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes over all domains, training and validation."""
        return sum(len(domain.data) for domain in self.domains)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the domains' bytes, one after the other; goes into every result."""
        digest = hashlib.sha256()
        for domain in self.domains:
            digest.update(domain.data)
        return digest.hexdigest()

    def training(self, domain: int | None = None) -> npt.NDArray[np.uint8]:
        """Training bytes, uint8 (n,), of one domain, or of all in order."""
        parts = self.domains if domain is None else (self.domains[domain],)
        return np.concatenate([part.training for part in parts])

    def validation(self, domain: int | None = None) -> npt.NDArray[np.uint8]:
        """Validation bytes, uint8 (n,), of one domain, or of all in order."""
        parts = self.domains if domain is None else (self.domains[domain],)
        return np.concatenate([part.validation for part in parts])

    def domain_of(self, site: int) -> int:
        """Index of the domain of `site` with domain_per_site: site % num_domains."""
        return site % len(self.domains)


def load_corpus(paths: Sequence[str | Path] = (), *, max_bytes: int = 0) -> Corpus:
    """Reads a corpus into memory.

    Parameters
    ----------
    paths
        UTF-8 files and folders, one domain each, named after the path. A folder contributes its
        files with a suffix in TEXT_SUFFIXES, recursively, in sorted order, hidden ones left out.
        Files are joined by one newline. Without paths: the domains "prose" (the topics of
        pydoc_data) and "code" (the standard library's sources without tests), which differ between
        Python versions: compare `sha256`.
    max_bytes
        Upper bound of the whole, 0 for none. Domains share it evenly, and what a short one leaves
        goes to the others; the cut is at a character boundary.

    Raises
    ------
    UserError
        A path is missing, unreadable, not UTF-8 (with the byte offset) or holds no text.
    """
    if paths:
        domains = [Domain(str(path), _read_path(Path(path), max_bytes)) for path in paths]
    else:
        code = _join(standard_library_sources(), max_bytes)
        domains = [Domain("prose", _python_topics()), Domain("code", code)]
    if max_bytes:
        shares = _fair_shares([len(domain.data) for domain in domains], max_bytes)
        domains = [
            Domain(domain.name, _cut(domain.data, share))
            for domain, share in zip(domains, shares, strict=True)
        ]
    empty = [domain.name for domain in domains if not domain.data]
    if empty:
        raise UserError(f"data.max_bytes: {max_bytes} bytes leave no text in domain {empty[0]!r}")
    return Corpus(tuple(domains))


def _read_path(path: Path, max_bytes: int) -> bytes:
    """The joined text of one file or folder, or at least its first `max_bytes` if not 0."""
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"data.paths: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"data.paths: cannot read {path}: {error.strerror}") from None
    files = list(_text_files(path)) if path.is_dir() else [path]
    if not files:
        suffixes = " ".join(sorted(TEXT_SUFFIXES))
        raise UserError(f"data.paths: folder {path} holds no text file (one of {suffixes})")
    text = _join(map(_read_file, files), max_bytes)
    if not text.strip(b"\n"):
        raise UserError(f"data.paths: {path} is empty: expected UTF-8 text, got {len(text)} bytes")
    return text


def _join(texts: Iterable[bytes], max_bytes: int) -> bytes:
    """The texts with one newline between them; those past `max_bytes` are not even read."""
    chosen: list[bytes] = []
    size = 0
    for text in texts:
        chosen.append(text)
        size += len(text)
        if max_bytes and size >= max_bytes:
            break
    return b"\n".join(chosen)


def _text_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"data.paths: cannot read folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in TEXT_SUFFIXES:
                yield Path(parent, name)


def _read_file(file: Path) -> bytes:
    try:
        data = file.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise UserError(f"data.paths: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.paths: {file} is not UTF-8: "
            f"byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    return data


def _python_topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items())).encode("utf-8")


def standard_library_sources() -> Iterator[bytes]:
    """Python sources of the running interpreter's standard library, each in UTF-8, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for entry in sorted(root.iterdir()):
        if entry.suffix == ".py" and not entry.name.startswith("_sysconfigdata"):
            files: Iterator[Path] = iter([entry])
        elif (
            entry.name not in _SKIPPED_PACKAGES | _SKIPPED_FOLDERS
            and (entry / "__init__.py").is_file()
        ):
            files = _package_sources(entry)
        else:
            continue
        for file in files:
            text = file.read_bytes()
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                continue  # a source may declare another encoding
            yield text


def _package_sources(package: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(package):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".py"))


def _fair_shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Bytes per domain, at most its size; what a short one leaves of `limit` is shared."""
    shares = [0] * len(sizes)
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], limit // (len(sizes) - rank))
        limit -= shares[index]
    return shares


def _cut(data: bytes, size: int) -> bytes:
    """The first `size` bytes or up to three fewer, so that no UTF-8 character is cut."""
    if size >= len(data):
        return data
    while size > 0 and data[size] & 0xC0 == 0x80:
        size -= 1
    return data[:size]


def _split(data: bytes, *, validation: bool) -> npt.NDArray[np.uint8]:
    tokens = np.frombuffer(data, dtype=np.uint8)
    blocks = [tokens[start : start + _BLOCK] for start in range(0, len(tokens), _BLOCK)]
    chosen = [block for i, block in enumerate(blocks) if (i % _VALIDATION_EVERY == 0) == validation]
    return np.concatenate([tokens[:0], *chosen])
