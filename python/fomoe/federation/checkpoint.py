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
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fomoe.errors import UserError
from fomoe.federation.health import RoutingHealth
from fomoe.federation.placement import Placement
from fomoe.files import cannot, make_folder, sync_file, sync_folder

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "FileRecord",
    "Manifest",
    "Position",
    "Totals",
    "commit",
    "find_checkpoint",
    "fresh_incomplete_folder",
    "holds_checkpoints",
    "incomplete_folder",
    "is_round_folder",
    "read_shards",
    "remove_incomplete",
    "remove_older",
    "round_folder",
    "write_shard",
]

FORMAT_VERSION = 1
_REMOVED = ".removed-"
_ROUND_FOLDER = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint, as the manifest lists it; ``kind`` is "model" or "state"."""

    name: str
    kind: str
    site: int
    bytes: int
    sha256: str


class Totals(BaseModel):
    """What a run has added up to when its checkpoint was written; a resumed run goes on from it."""

    model_config = ConfigDict(strict=True)

    tokens: int
    seconds: float
    ghost_shares: list[float]
    routing_health: RoutingHealth
    exchange_bytes: list[int]
    bytes_by_class: dict[str, int]


class Manifest(BaseModel):
    """What ``manifest.json`` holds, beside the ``format_version``.

    ``config`` is by section and key; ``model`` rebuilds the model; ``placement`` gives the holders
    by layer and expert; ``data_cursor`` where each site stands in its data. ``summary`` is what
    summary.json says of the run up to here.
    """

    model_config = ConfigDict(strict=True)

    config: dict[str, dict[str, Any]]
    model: dict[str, Any]
    completed_rounds: int
    step: int
    placement: list[list[list[int]]]
    rng: dict[str, int]
    data_cursor: list[dict[str, Any]]
    corpus_sha256: str | None
    totals: Totals
    summary: dict[str, Any]
    threads_per_site: list[int]
    versions: dict[str, str]
    files: list[FileRecord]


def round_folder(run: Path, completed_rounds: int) -> Path:
    """Where the checkpoint after that many rounds of the run belongs."""
    return run / "checkpoints" / f"round-{completed_rounds:06d}"


def is_round_folder(path: Path) -> bool:
    """Whether the folder has the name of a checkpoint; nothing is looked up."""
    return _ROUND_FOLDER.fullmatch(path.name) is not None


def fresh_incomplete_folder(run: Path) -> Path:
    """The hidden folder sites write to before :func:`commit`, emptied of an earlier attempt."""
    folder = incomplete_folder(run)
    remove_incomplete(run)
    with cannot(f"write {folder}"):
        make_folder(folder.parent)
        folder.mkdir()
    return folder


def incomplete_folder(run: Path) -> Path:
    return run / "checkpoints" / ".incomplete"


def remove_incomplete(run: Path) -> None:
    """Remove the hidden folder with all that is in it, if it is there."""
    _remove(incomplete_folder(run))


def write_shard(folder: Path, kind: str, site: int, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write one site's tensors to ``folder`` and sync them to disk.

    Raises
    ------
    UserError
        When the disk is full or the folder cannot be written.
    """
    path = folder / f"{kind}-{site}.safetensors"
    with _cannot_write(f"checkpoint file {path}"):
        save_file({name: _with_own_storage(tensor) for name, tensor in tensors.items()}, path)
        sync_file(path)
        return FileRecord(path.name, kind, site, path.stat().st_size, _sha256(path))


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a row of a stacked one: the format refuses shared storage."""
    value = tensor.detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def commit(folder: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest into ``folder`` and make it the checkpoint ``final`` in one step.

    Raises
    ------
    UserError
        When the disk is full or the folder cannot be written.
    """
    path = folder / "manifest.json"
    values = {"format_version": FORMAT_VERSION, **manifest.model_dump()}
    with cannot(f"write checkpoint {final}"):
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        sync_file(path)
        sync_folder(folder)
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        sync_folder(final.parent)


def remove_older(run: Path, keep: int) -> None:
    """Remove all checkpoints of a run but the latest ``keep``; each disappears in one step.

    What an earlier removal has left behind goes as well.

    Raises
    ------
    UserError
        A folder cannot be written.
    """
    for path in _checkpoints(run)[:-keep]:
        with cannot(f"remove checkpoint {path}"):
            path.rename(path.with_name(f"{_REMOVED}{path.name}"))
            sync_folder(path.parent)  # or a power failure could bring back the name of a part
    for hidden in run.glob(f"checkpoints/{_REMOVED}*"):
        _remove(hidden)


def _remove(folder: Path) -> None:
    """So that a power failure does not bring it back; what cannot be removed stays."""
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        with cannot(f"remove {folder}"):
            sync_folder(folder.parent)


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint in ``folder``: itself, or the latest one of the run it belongs to.

    Raises
    ------
    UserError
        When there is none.
    """
    if (folder / "manifest.json").is_file():
        return folder
    found = _checkpoints(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint: expected {folder}/checkpoints/round-*")
    return found[-1]


def holds_checkpoints(path: Path) -> bool:
    """Whether this is a checkpoint, or the folder of a run."""
    return (path / "checkpoints").is_dir() or (path / "manifest.json").is_file()


def _checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, by completed rounds."""
    found = [
        (int(match[1]), path)
        for path in run.glob("checkpoints/round-*")
        if (match := _ROUND_FOLDER.fullmatch(path.name)) and (path / "manifest.json").is_file()
    ]
    return [path for _, path in sorted(found)]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run was when its checkpoint was written; ``step`` is of the optimizer."""

    completed_rounds: int
    step: int
    data_cursor: list[dict[str, Any]]
    placement: Placement


class Checkpoint:
    """A checkpoint on disk, for reading.

    Raises
    ------
    UserError
        When it is missing, damaged, or of a newer format than this version reads.
    """

    def __init__(self, folder: Path) -> None:
        manifest = _read_manifest(folder / "manifest.json")
        self.folder = folder
        self.manifest: dict[str, Any] = manifest.model_dump()
        self.files = manifest.files

    def verify(self, kind: str | None = None) -> None:
        """Compare every file, or those of one kind, with the manifest's SHA-256."""
        for record in self.files:
            if kind not in (None, record.kind):
                continue
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

    @property
    def placement(self) -> Placement:
        """Where the experts were."""
        table = self.manifest["placement"]
        return Placement(self.sites, tuple(tuple(map(tuple, layer)) for layer in table))

    @property
    def position(self) -> Position:
        return Position(
            self.manifest["completed_rounds"],
            self.manifest["step"],
            self.manifest["data_cursor"],
            self.placement,
        )

    @property
    def sites(self) -> int:
        """How many had a part in it."""
        return len(self.manifest["data_cursor"])

    def state_names(self, site: int) -> set[str]:
        """The names in what site ``site`` wrote as its own state."""
        return {name for path in self._state_files(site) for name in shard_names(path)}

    def state(self, site: int, names: set[str] | None = None) -> dict[str, Tensor]:
        """What site ``site`` wrote as its own state, all or those in ``names``."""
        return read_shards(self._state_files(site), names)

    def _state_files(self, site: int) -> list[Path]:
        return [self.folder / f.name for f in self.files if f.kind == "state" and f.site == site]

    def model(self, names: set[str] | None = None) -> dict[str, Tensor]:
        """Tensors of the model by name, all or those in ``names``; only these are read."""
        tensors = read_shards(
            [self.folder / f.name for f in self.files if f.kind == "model"], names
        )
        if names is not None and names != tensors.keys():
            missing = sorted(names - tensors.keys())
            raise UserError(f"{self.folder} lacks {len(missing)} tensors, first: {missing[0]}")
        return tensors


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


def shard_names(path: Path) -> list[str]:
    """Names of the tensors in a file, which is not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read checkpoint file {path}: {error}") from error


def _read_manifest(path: Path) -> Manifest:
    with cannot(f"read {path}"):
        text = path.read_bytes()
    try:
        version = json.loads(text)["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path.parent} has format_version {version}; "
                f"this fomoe reads up to {FORMAT_VERSION}"
            )
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {key}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _cannot_write(what: str) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own."""
    try:
        with cannot(f"write {what}"):
            yield
    except SafetensorError as error:
        raise UserError(f"cannot write {what}: {error}") from error
