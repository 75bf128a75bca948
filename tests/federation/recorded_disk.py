# SPDX-License-Identifier: Apache-2.0
"""What a disk holds after a crash at any instant: recorded once, put together for every instant.

Nothing of a killed process survives but its files. So a run is recorded, every change of a file or
folder in the order it happened, and any beginning of the record is what a kill at that instant
leaves. A power failure leaves less: a :class:`Disk` also knows what had been synced by then.
"""

import builtins
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

import fomoe.federation.checkpoint

Tree = dict[str, bytes | None]
"""Contents by path below the root; None for a folder."""


class Killed(BaseException):
    """What a site or the coordinator meets where the process is killed."""


@dataclass(frozen=True)
class Change:
    """One change: ``kind`` is a method of :class:`Disk`; a "note" changes nothing."""

    kind: str
    path: str = ""
    value: Any = None


class Recorder:
    """Writes down all that this process does to files below ``root``, until instant ``stop``.

    From there on every recorded operation raises :class:`Killed` and changes nothing.
    """

    def __init__(self, root: Path, stop: int | None = None) -> None:
        self.root = root.resolve()
        self.stop = stop
        self.changes: list[Change] = []

    def note(self, kind: str, value: Any = None) -> None:
        """An instant at which no file changes."""
        self.add(Change("note", kind, value))

    def add(self, change: Change) -> None:
        if self.stop is not None and len(self.changes) >= self.stop:
            raise Killed
        self.changes.append(change)

    def inside(self, path: Any, folder: int | None = None) -> str | None:
        """The path below the root, None when it is elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            path = Path(os.readlink(f"/proc/self/fd/{folder}")) / os.fspath(path)
        full = Path(os.path.abspath(path))
        return str(full.relative_to(self.root)) if full.is_relative_to(self.root) else None

    @contextmanager
    def recording(self) -> Iterator[pytest.MonkeyPatch]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", self._open(io.open))
            patch.setattr(builtins, "open", io.open)
            patch.setattr(fomoe.federation.checkpoint, "save_file", self._save_file)
            # The record is the disk that matters: nothing waits for the real one.
            patch.setattr(os, "fsync", self._before("sync", lambda descriptor: None))
            for name, kind in (("mkdir", "make_folder"), ("unlink", "remove"), ("rmdir", "remove")):
                patch.setattr(os, name, self._before(kind, getattr(os, name)))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._rename(getattr(os, name)))
            yield patch

    def _before(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(path: Any, *args: Any, **options: Any) -> Any:
            inside = self.inside(path, options.get("dir_fd"))
            if inside is None or not _succeeds(kind, self.root / inside):
                return original(path, *args, **options)
            self.add(Change(kind, inside))
            return original(path, *args, **options)

        return recorded

    def _rename(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(source: Any, target: Any) -> Any:
            inside = self.inside(source)
            if inside is not None:
                self.add(Change("rename", inside, self.inside(target)))
            return original(source, target)

        return recorded

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *args: Any
        ) -> Any:
            inside = None if isinstance(file, int) or mode in ("r", "rb") else self.inside(file)
            if inside is None:
                return original(file, mode, buffering, encoding, *args)
            assert mode in ("w", "wb", "ab"), "the record would lack what is written"
            if mode != "ab" or not Path(file).exists():
                self.add(Change("make_file", inside))
            raw = _RecordedFile(self, inside, file, "ab" if mode == "ab" else "wb")
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding)

        return recorded

    def _save_file(self, tensors: Any, path: Path, metadata: Any = None) -> None:
        """The library writes from Rust; the bytes are the same."""
        with path.open("wb", buffering=0) as file:
            file.write(save(tensors, metadata))


class _RecordedFile(io.FileIO):
    def __init__(self, recorder: Recorder, inside: str, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._recorder, self._inside = recorder, inside

    def write(self, data: Any) -> int:
        """In two halves, so that there is an instant at which the file is torn."""
        data = bytes(data)
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            if part:
                self._recorder.add(Change("write", self._inside, part))
                assert super().write(part) == len(part)
        return len(data)


def _succeeds(kind: str, path: Path) -> bool:
    """Whether there will be a change, or only an error that the caller deals with."""
    if kind == "make_folder":
        return path.parent.exists() and not path.exists()
    return path.exists()


# ---- what a crash leaves -----------------------------------------------------------------------


@dataclass
class File:
    content: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    names: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)


class Disk:
    """Files and folders as the processes see them, and as they are after a power failure.

    A file keeps the content of its last sync, a folder the names of its last sync: POSIX promises
    no more. In practice any of the later changes may have arrived as well.
    """

    def __init__(self, tree: Tree) -> None:
        """Everything in ``tree``, where folders come before their contents, is synced."""
        self.root = Folder()
        for path, content in tree.items():
            folder, name = self._place(path)
            folder.names[name] = Folder() if content is None else File(content, content)
            folder.synced[name] = folder.names[name]

    def apply(self, change: Change) -> None:
        if change.kind != "note":
            getattr(self, f"_{change.kind}")(change.path, change.value)

    def _place(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).parts
        folder = self.root
        for parent in parents:
            entry = folder.names[parent]
            assert isinstance(entry, Folder)
            folder = entry
        return folder, name

    def _make_file(self, path: str, _: None) -> None:
        folder, name = self._place(path)
        file = folder.names.setdefault(name, File())
        assert isinstance(file, File)
        file.content = b""

    def _make_folder(self, path: str, _: None) -> None:
        folder, name = self._place(path)
        folder.names[name] = Folder()

    def _write(self, path: str, data: bytes) -> None:
        folder, name = self._place(path)
        file = folder.names[name]
        assert isinstance(file, File)
        file.content += data

    def _sync(self, path: str, _: None) -> None:
        entry: File | Folder = self.root
        if path != ".":
            folder, name = self._place(path)
            entry = folder.names[name]
        if isinstance(entry, File):
            entry.synced = entry.content
        else:
            entry.synced = dict(entry.names)

    def _rename(self, path: str, target: str) -> None:
        (source, name), (folder, new_name) = self._place(path), self._place(target)
        folder.names[new_name] = source.names.pop(name)

    def _remove(self, path: str, _: None) -> None:
        folder, name = self._place(path)
        del folder.names[name]

    def left(self, crash: str, number: int = 0) -> Tree:
        """What is there after a crash of that kind; ``number`` makes the mixed ones differ.

        kill               everything: the system goes on
        nothing unsynced   a power failure, as bad as can be
        names              what had been renamed, made or removed is, but contents are lost
        zeros              the same, and files have their sizes: blocks that were never written
        holes              the same, where the later blocks were written
        contents           names are lost, of contents everything is there
        mixed              every file and folder by chance
        """
        rng = random.Random(number)
        on_names = ("kill", "names", "zeros", "holes")
        tree: Tree = {}

        def names_survive() -> bool:
            return rng.random() < 0.5 if crash == "mixed" else crash in on_names

        def content_of(file: File) -> bytes:
            kind = rng.choice(on_names) if crash == "mixed" else crash
            if kind in ("kill", "contents") or file.content == file.synced:
                return file.content
            if kind in ("zeros", "holes"):
                is_longer = file.content.startswith(file.synced)
                begin, end = len(file.synced) * is_longer, len(file.content)
                if kind == "holes":
                    end = (begin + end) // 2
                return file.content[:begin] + bytes(end - begin) + file.content[end:]
            return file.synced

        def walk(folder: Folder, prefix: str) -> None:
            for name, entry in (folder.names if names_survive() else folder.synced).items():
                path = f"{prefix}{name}"
                tree[path] = None if isinstance(entry, Folder) else content_of(entry)
                if isinstance(entry, Folder):
                    walk(entry, f"{path}/")

        walk(self.root, "")
        return tree


CRASHES = ("kill", "nothing unsynced", "names", "zeros", "holes", "contents", "mixed")


def write_tree(tree: Tree, root: Path) -> None:
    for name, content in tree.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True)
        else:
            path.write_bytes(content)


def read_tree(root: Path) -> Tree:
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }
