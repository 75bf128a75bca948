# SPDX-License-Identifier: Apache-2.0
"""The data of a run behind one interface, whether a text in memory or streams of documents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Batches", "Batching", "Facts", "TrainingData"]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """What the settings say of batches; names as there."""

    num_sites: int
    batch_size: int
    sequence_length: int
    seed: int
    domain_per_site: bool
    validation_sequences: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a summary says of the data.

    `unit` is what a token is; the entropies (nats per byte) are of a text in memory, None for
    streams, which nobody reads to the end beforehand.
    """

    num_bytes: int
    unit: Literal["byte", "token"]
    unigram_entropy: float | None
    bigram_entropy: float | None


class Batches(Protocol):
    """Training batches of one site."""

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Tokens (B, S + 1) int64 of 0-based `step`; steps are asked for in order."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the site stands, as JSON-able values."""
        ...


class TrainingData(Protocol):
    """The data of a run. An instance travels to the sites by pickle."""

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) that identifies the data; goes into every result."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id there can be."""
        ...

    def facts(self) -> Facts: ...

    def check(self) -> None:
        """Raise UserError now for data that would fail in the middle of a run."""
        ...

    def batches(self, site: int, states: Sequence[Mapping[str, Any]] = ()) -> Batches:
        """Batches of one site: from the start, or from the `state` of every site of a run."""
        ...

    def validation(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Validation batches, int64 (up to `batch_size`, S + 1), the same at every call."""
        ...
