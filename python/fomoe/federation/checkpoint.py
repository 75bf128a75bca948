# SPDX-License-Identifier: Apache-2.0
"""The checkpoint: a folder with a manifest and safetensors files keyed by tensor name.

    checkpoints/round-000012/
        manifest.json            format version, settings, placement, data cursor, SHA-256 per file
        model-0.safetensors      what site 0 writes of the model; the files together are the model
        state-0.safetensors      site 0's own: AdamW moments, and the outer momentum of what it owns

Every site writes its files into a hidden folder and syncs them; the coordinator adds the manifest
and renames the folder. A checkpoint that can be seen is therefore whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe.errors import UserError
from fomoe.files import write_whole
from fomoe.models import MODEL_FORMAT_VERSION

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "FileRecord",
    "commit",
    "export",
    "file_records",
    "find_checkpoint",
    "fresh_incomplete_folder",
    "incomplete_folder",
    "read_shards",
    "round_folder",
    "write_shard",
]

FORMAT_VERSION = 1
_ROUND_FOLDER = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint, as the manifest lists it; ``kind`` is "model" or "state"."""

    name: str
    kind: str
    site: int
    bytes: int
    sha256: str


def round_folder(run: Path, completed_rounds: int) -> Path:
    """Where the checkpoint after that many rounds of the run belongs."""
    return run / "checkpoints" / f"round-{completed_rounds:06d}"


def fresh_incomplete_folder(run: Path) -> Path:
    """The hidden folder sites write to before :func:`commit`, emptied of an earlier attempt."""
    folder = incomplete_folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def incomplete_folder(run: Path) -> Path:
    return run / "checkpoints" / ".incomplete"


def write_shard(folder: Path, kind: str, site: int, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write one site's tensors to ``folder`` and sync them to disk.

    Raises
    ------
    UserError
        When the disk is full or the folder cannot be written.
    """
    path = folder / f"{kind}-{site}.safetensors"
    # A clone per tensor: rows of a stacked parameter share storage, which the format refuses.
    owned = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        save_file(owned, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return FileRecord(path.name, kind, site, path.stat().st_size, _sha256(path))
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot write checkpoint file {path}: {reason}") from error


def commit(folder: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into ``folder`` and make it the checkpoint ``final`` in one step."""
    path = folder / "manifest.json"
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump({"format_version": FORMAT_VERSION, **manifest}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        _sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot write checkpoint {final}: {error.strerror}") from error


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint in ``folder``: itself, or the latest one of the run it belongs to.

    Raises
    ------
    UserError
        When there is none.
    """
    if (folder / "manifest.json").is_file():
        return folder
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoints/round-*")
        if (match := _ROUND_FOLDER.fullmatch(path.name)) and (path / "manifest.json").is_file()
    ]
    if not found:
        raise UserError(f"{folder} holds no checkpoint: expected {folder}/checkpoints/round-*")
    return max(found)[1]


class Checkpoint:
    """A checkpoint on disk, for reading.

    Raises
    ------
    UserError
        When it is missing, damaged, or of a newer format than this version reads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
            version = self.manifest["format_version"]
            self.files = [FileRecord(**record) for record in self.manifest["files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}/manifest.json is missing or damaged: {error}") from error
        if version > FORMAT_VERSION:
            raise UserError(
                f"{folder} has format_version {version}; this fomoe reads up to {FORMAT_VERSION}"
            )

    def verify(self) -> None:
        """Compare every file with the manifest's SHA-256."""
        for record in self.files:
            path = self.folder / record.name
            try:
                digest = _sha256(path)
            except OSError as error:
                raise UserError(f"checkpoint file {path}: {error.strerror}") from error
            if digest != record.sha256:
                raise UserError(
                    f"checkpoint file {path} is damaged: SHA-256 {digest[:12]}..., "
                    f"the manifest says {record.sha256[:12]}..."
                )

    def state(self, site: int) -> dict[str, Tensor]:
        """What site ``site`` wrote as its own state."""
        paths = [self.folder / f.name for f in self.files if f.kind == "state" and f.site == site]
        return read_shards(paths)

    def model(self, names: set[str] | None = None) -> dict[str, Tensor]:
        """Tensors of the model by name, all or those in ``names``; only these are read."""
        tensors = read_shards(
            [self.folder / f.name for f in self.files if f.kind == "model"], names
        )
        if names is not None and names != tensors.keys():
            missing = sorted(names - tensors.keys())
            raise UserError(f"{self.folder} lacks {len(missing)} tensors, first: {missing[0]}")
        return tensors


def export(run: Path, out: Path) -> None:
    """Write the assembled model of a run's latest checkpoint as one safetensors file.

    Its header names the model's settings, so that :func:`fomoe.models.load_model` can rebuild it.

    Raises
    ------
    UserError
        When there is no whole checkpoint, or ``out`` cannot be written.
    """
    checkpoint = Checkpoint(find_checkpoint(run))
    checkpoint.verify()
    metadata = {
        "format": "pt",
        "fomoe_format_version": str(MODEL_FORMAT_VERSION),
        "fomoe_model": json.dumps(checkpoint.manifest["model"]),
    }
    try:
        write_whole(out, lambda path: save_file(checkpoint.model(), path, metadata))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from error


def file_records(records: list[FileRecord]) -> list[dict[str, Any]]:
    """The records as the manifest lists them, by name."""
    return [asdict(record) for record in sorted(records, key=lambda record: record.name)]


def read_shards(paths: Iterable[Path], names: set[str] | None = None) -> dict[str, Tensor]:
    """All tensors of these files by name, or those in ``names``; only these are read."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    if names is None or name in names:
                        tensors[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read checkpoint file {path}: {error}") from error
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
