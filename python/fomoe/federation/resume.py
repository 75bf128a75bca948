# SPDX-License-Identifier: Apache-2.0
"""What must be the same when a run goes on from a checkpoint, and what is worth a line if not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fomoe.errors import UserError
from fomoe.federation.config import Config

__all__ = ["check_corpus", "check_settings", "differences", "notes"]

# Settings a resumed run may change: they alter neither the model nor what a site has seen.
_FREE = {
    "run",
    "evaluation",
    "federation.rounds",
    "federation.timeout",
    "training.device",
    "training.threads",
}
# May change, too: model, momenta and data are dealt out anew, see fomoe.federation.site_state.
_DEALT_ANEW = {
    f"federation.{key}"
    for key in (
        "sites",
        "overlap",
        "strategy",
        "placement",
        "shuffle_every",
        "full_replica_rounds",
        "moved_warmup_steps",
        "router_mean",
        "scale_expert_steps",
        "codec",
        "ranks_per_site",
        "parallel",
        "spread_experts",
    )
}


_CONSEQUENCES = {
    "federation.sites": (
        ": tensors and momenta have new owners, the data goes on after what all sites have seen, "
        "and a step of all sites together takes another number of sequences"
    ),
    "federation.overlap": ": a site begins with the weights and moments of experts new to it",
}


def check_settings(manifest: Mapping[str, Any], config: Config, folder: Path) -> None:
    """Compare the settings with those of the checkpoint.

    Raises
    ------
    UserError
        One that may not change differs.
    """
    free = _FREE | _DEALT_ANEW
    for key, then, now in differences(manifest["config"], config.to_dict(), free):
        raise UserError(f"{key} is {now!r}, but the run in {folder} was trained with {then!r}")


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], free: set[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, other value) of settings that differ, but for the keys and sections in ``free``.

    Settings are by section and key, as :meth:`Config.to_dict` gives them.
    """
    first, second = _flatten(one), _flatten(other)
    for key in sorted(first.keys() | second.keys()):
        if key in free or key.split(".")[0] in free:
            continue
        if first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


def check_corpus(manifest: Mapping[str, Any], corpus_sha256: str | None, folder: Path) -> None:
    """Compare the data with the checkpoint's.

    Raises
    ------
    UserError
        They differ; both hashes are named.
    """
    if manifest["corpus_sha256"] != corpus_sha256:
        raise UserError(
            f"the data has SHA-256 {corpus_sha256}, but the run in {folder} was "
            f"trained on {manifest['corpus_sha256']}"
        )


def notes(manifest: Mapping[str, Any], config: Config, threads: int) -> list[str]:
    """A sentence on everything that makes the resumed run differ from an uninterrupted one.

    ``threads`` are the CPU threads that a site has now.
    """
    found = []
    not_exact = "the result will not be bit-exact:"
    if (torch_then := manifest["versions"].get("torch")) != torch.__version__:
        found.append(f"{not_exact} torch was {torch_then}, is now {torch.__version__}")
    threads_then = set(manifest["threads_per_site"])
    if threads_then != {threads}:
        then = ", ".join(map(str, sorted(threads_then)))
        found.append(f"{not_exact} threads per site were {then}, are now {threads}")
    device_then = manifest["config"]["training"]["device"]
    device = config.to_dict()["training"]["device"]
    if device_then != device:
        found.append(f"{not_exact} training.device was {device_then!r}, is now {device!r}")
    for key, before, now in differences(manifest["config"], config.to_dict(), _FREE):
        if key in _DEALT_ANEW:
            consequence = _CONSEQUENCES.get(key, "")
            found.append(f"{not_exact} {key} was {before!r}, is now {now!r}{consequence}")
    rounds_then, rounds = manifest["config"]["federation"]["rounds"], config.federation.rounds
    if rounds_then != rounds and config.optimizer.min_lr_ratio != 1:
        found.append(
            f"federation.rounds was {rounds_then}, is now {rounds}: the learning rate goes on as "
            f"if {rounds} rounds had been planned from the start"
        )
    return found


def _flatten(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in settings.items()
        for key, value in values.items()
    }
