# SPDX-License-Identifier: Apache-2.0
"""The data of a run that trains on a text in memory: bytes, with random access."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.data.batches import SiteBatches, validation_batches
from fomoe.data.corpus import Corpus, load_corpus
from fomoe.data.entropy import bigram_entropy, unigram_entropy
from fomoe.data.training_data import Batching, Facts

__all__ = ["TextData"]


class TextData:
    """`data.paths`, or the built-in text of every Python; every site reads all of it.

    `paths` and `max_bytes` are those of `load_corpus`.
    """

    vocab_size = 256

    def __init__(self, paths: Sequence[str], max_bytes: int, batching: Batching) -> None:
        self._paths = tuple(paths)
        self._max_bytes = max_bytes
        self._batching = batching
        self._corpus: Corpus | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Every site reads the text itself instead of receiving a copy.
        return self.__dict__ | {"_corpus": None}

    @property
    def corpus(self) -> Corpus:
        """The text, read at the first use."""
        if self._corpus is None:
            self._corpus = load_corpus(self._paths, max_bytes=self._max_bytes)
        return self._corpus

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the text's bytes."""
        return self.corpus.sha256

    def facts(self) -> Facts:
        """What a summary says of the text."""
        text = np.frombuffer(b"".join(each.data for each in self.corpus.domains), dtype=np.uint8)
        return Facts(
            num_bytes=self.corpus.num_bytes,
            unit="byte",
            unigram_entropy=unigram_entropy(text),
            bigram_entropy=bigram_entropy(text),
        )

    def check(self) -> None:
        """Raise UserError for a text that is too short for a batch or for validation."""
        for site in range(self._batching.num_sites):
            self.batches(site)
        self.validation(batch_size=1)

    def batches(self, site: int, states: Sequence[Mapping[str, Any]] = ()) -> SiteBatches:
        """Training batches of one site, from the start or from the `states` of all sites."""
        batching = self._batching
        return SiteBatches(
            self.corpus,
            site=site,
            num_sites=batching.num_sites,
            batch_size=batching.batch_size,
            sequence_length=batching.sequence_length,
            seed=batching.seed,
            domain_per_site=batching.domain_per_site,
            states=states,
        )

    def validation(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Validation batches of all domains (see `validation_batches`)."""
        return validation_batches(
            self.corpus,
            sequence_length=self._batching.sequence_length,
            num_sequences=self._batching.validation_sequences,
            batch_size=batch_size,
        )
