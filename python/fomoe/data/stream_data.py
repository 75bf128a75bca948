# SPDX-License-Identifier: Apache-2.0
"""The data of a run that trains on streams of documents: weighted sources, any tokenizer."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.data.batches import sharing_sites
from fomoe.data.documents import Documents, open_documents
from fomoe.data.mixture import Mixture, StreamBatches
from fomoe.data.sources import Source, find_files
from fomoe.data.streams import TokenStream, check_documents, deal_again, validation_tokens
from fomoe.data.tokenization import Tokenization, tokenization
from fomoe.data.training_data import Batching, Facts
from fomoe.errors import UserError

__all__ = ["StreamData"]


class StreamData:
    """Sources of documents, each split between the sites that read it.

    Every site reads all sources, in the shares of their weights; with `domain_per_site`, site m
    reads source m % num_sources alone. The validation windows are the first of the validation
    documents of each source, in the same shares, at least one each. They travel with the pickle, as
    do the digests, so that a site's process opens only the sources it trains on.

    Raises
    ------
    UserError
        There are more sources than sites with `domain_per_site`.
    """

    def __init__(
        self, sources: Sequence[Source], tokenizer: str, separator: str, batching: Batching
    ) -> None:
        if batching.domain_per_site and len(sources) > batching.num_sites:
            raise UserError(
                f"data.domain_per_site: {len(sources)} sources need at least as many sites, "
                f"got federation.sites = {batching.num_sites}"
            )
        self._sources = tuple(sources)
        self._tokenizer = tokenizer
        self._separator = separator
        self._batching = batching
        self._digests: list[str] | None = None
        self._windows: npt.NDArray[np.int64] | None = None
        self._opened: dict[int, Documents] = {}
        self._tokenization: Tokenization | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}, "_tokenization": None}

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) over the sources' digests (`SourceFiles.sha256`) and the tokenizer file."""
        if self._digests is None:
            self._digests = [self._digest(index) for index in range(len(self._sources))]
            self._digests.append(self._tokens().sha256)
        return hashlib.sha256("\n".join(self._digests).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; 256 for bytes."""
        return self._tokens().vocab_size

    def facts(self) -> Facts:
        """What a summary says of the data; bytes are those on disk."""
        sources = [self._documents(index).source for index in range(len(self._sources))]
        return Facts(
            num_bytes=sum(source.num_bytes for source in sources),
            unit="token" if self._tokenizer else "byte",
            unigram_entropy=None,
            bigram_entropy=None,
        )

    def check(self) -> None:
        """Open everything, look at the beginning of every file, and read the validation windows.

        Raises
        ------
        UserError
            Something is missing, damaged or too short.
        """
        self._tokens()
        for index in range(len(self._sources)):
            documents = self._documents(index)
            documents.check()
            check_documents(documents, len(self._readers(index, self._batching.num_sites)))
        self._validation_windows()
        _ = self.sha256  # what the sites compare theirs with

    def batches(self, site: int, states: Sequence[Mapping[str, Any]] = ()) -> StreamBatches:
        """Training batches of one site, from the start or from the `states` of all sites.

        Raises
        ------
        UserError
            This site's files are others than those the coordinator has read.
        """
        batching = self._batching
        mine = [site % len(self._sources)] if batching.domain_per_site else self._indices
        self._compare(site, mine)
        # With as many sites as before, a site goes on exactly where it was.
        own = states[site] if len(states) == batching.num_sites else None
        return StreamBatches(
            {index: self._stream(index, site, states) for index in mine},
            Mixture([self._sources[index].weight for index in mine], seed=batching.seed, site=site),
            batch_size=batching.batch_size,
            sequence_length=batching.sequence_length,
            step=own["step"] if own else max((s["step"] for s in states), default=0),
            sequences=own["sequences"] if own else max((s["sequences"] for s in states), default=0),
        )

    def validation(self, batch_size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Validation batches, int64 (up to `batch_size`, S + 1), source after source."""
        windows = self._validation_windows()
        return (windows[start : start + batch_size] for start in range(0, len(windows), batch_size))

    @property
    def _indices(self) -> list[int]:
        return list(range(len(self._sources)))

    def _stream(self, index: int, site: int, states: Sequence[Mapping[str, Any]]) -> TokenStream:
        readers = self._readers(index, self._batching.num_sites)
        rank = readers.index(site)
        before = [
            states[reader]["sources"][str(index)] for reader in self._readers(index, len(states))
        ]
        state = None
        if before:
            state = before[rank] if len(before) == len(readers) else deal_again(before)
        return TokenStream(
            self._documents(index), self._tokens(), rank=rank, num_ranks=len(readers), state=state
        )

    def _readers(self, index: int, num_sites: int) -> range:
        """The sites, among `num_sites`, that read the source."""
        num_domains = len(self._sources) if self._batching.domain_per_site else 1
        return sharing_sites(index, num_sites, num_domains)

    def _compare(self, site: int, indices: Sequence[int]) -> None:
        """This process may be on another machine, or a file may have changed since the check."""
        if self._digests is None:
            return
        found = {
            **{self._documents(index).source.label: index for index in indices},
            "data.tokenizer": len(self._sources),
        }
        for label, index in found.items():
            digest = self._digest(index) if index < len(self._sources) else self._tokens().sha256
            if digest != self._digests[index]:
                raise UserError(
                    f"site {site} found {label} with SHA-256 {digest}, but the coordinator with "
                    f"{self._digests[index]}"
                )

    def _documents(self, index: int) -> Documents:
        if index not in self._opened:
            source = find_files(f"data.sources[{index}]", self._sources[index])
            self._opened[index] = open_documents(source)
        return self._opened[index]

    def _digest(self, index: int) -> str:
        return self._documents(index).source.sha256

    def _tokens(self) -> Tokenization:
        if self._tokenization is None:
            self._tokenization = tokenization(self._tokenizer, self._separator)
        return self._tokenization

    def _validation_windows(self) -> npt.NDArray[np.int64]:
        if self._windows is None:
            total = sum(source.weight for source in self._sources)
            self._windows = np.concatenate(
                [
                    validation_tokens(
                        self._documents(index),
                        self._tokens(),
                        num_windows=max(
                            1, round(self._batching.validation_sequences * source.weight / total)
                        ),
                        width=self._batching.sequence_length + 1,
                    )
                    for index, source in enumerate(self._sources)
                ]
            )
        return self._windows
