# SPDX-License-Identifier: Apache-2.0
"""Which sequences a site sees at which step: the same for every strategy.

B sequences per site and step, S tokens per sequence. A sequence is a window of S + 1 bytes (S
inputs and their targets); windows do not overlap, and bytes past the last whole window of an epoch
are not used (our choices).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.data.corpus import Corpus
from fomoe.errors import UserError

__all__ = ["SiteBatches", "sharing_sites", "validation_batches"]


class SiteBatches:
    """Training batches of one site.

    The N windows are numbered globally: sequence j of site m at step s has index g = (s * M + m) *
    B + j among M sites, belongs to epoch g // N, and is window `permutation(epoch)[g % N]`, the
    permutation drawn from numpy's PCG64([seed, epoch]). So within an epoch no two sites, and no two
    steps, see the same sequence.

    With `domain_per_site`, site m draws from domain m % num_domains, and the same rule holds inside
    that domain among its own sites.

    When a run goes on with another number of sites, numbering goes on from what all sites have
    seen: g = base + ((s - first_step) * M + m) * B + j, with base the sequences seen before
    first_step. So no sequence comes twice in an epoch then either.

    Parameters
    ----------
    corpus
        The text, the same object or an equal one on every site.
    site
        0-based, less than `num_sites`.
    batch_size
        B, sequences per step of this site.
    sequence_length
        S.
    states
        What `state` gave on every site of the run that goes on; none: from the start.

    Raises
    ------
    UserError
        The training text is too short for one sequence, or there are more domains than sites.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        site: int,
        num_sites: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        domain_per_site: bool = False,
        states: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        num_domains = len(corpus.domains)
        if domain_per_site and num_domains > num_sites:
            raise UserError(
                f"data.domain_per_site: {num_domains} domains need at least as many sites, "
                f"got federation.sites = {num_sites}"
            )
        domain = corpus.domain_of(site) if domain_per_site else None
        readers = sharing_sites(site, num_sites, num_domains if domain_per_site else 1)
        self._rank = readers.index(site)
        self._num_ranks = len(readers)
        self._first_step, self._base, self._next_step = 0, 0, 0
        if states:
            before = sharing_sites(site, len(states), num_domains if domain_per_site else 1)
            self._go_on(states, [states[reader] for reader in before])
        self._batch_size = batch_size
        self._seed = seed
        self._windows = _windows(corpus, domain, sequence_length, validation=False)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def num_sequences(self) -> int:
        """N: sequences of one epoch, over all sites that share this text."""
        return len(self._windows)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Byte tokens (B, S + 1) int64 of 0-based `step`: inputs [:, :-1], targets [:, 1:]."""
        self._next_step = step + 1
        first = self._seen(step) + self._rank * self._batch_size
        rows = [self._window_of(index) for index in range(first, first + self._batch_size)]
        return self._windows[rows].astype(np.int64)

    def state(self) -> dict[str, int]:
        """The cursor after the last batch: the next step, and the sequences seen before it.

        `first_step` and `base` are those of the numbering; `sequences` counts all sites that share
        this text.
        """
        return {
            "step": self._next_step,
            "first_step": self._first_step,
            "base": self._base,
            "sequences": self._seen(self._next_step),
        }

    def _seen(self, step: int) -> int:
        return self._base + (step - self._first_step) * self._num_ranks * self._batch_size

    def _go_on(
        self, states: Sequence[Mapping[str, Any]], of_readers: Sequence[Mapping[str, Any]]
    ) -> None:
        # A site may have left out the last steps of a round; the others say how far the round went.
        self._next_step = max(state["step"] for state in states)
        if len(of_readers) == self._num_ranks:
            self._first_step, self._base = of_readers[0]["first_step"], of_readers[0]["base"]
        else:
            self._first_step = self._next_step
            self._base = max(state["sequences"] for state in of_readers)

    def _window_of(self, index: int) -> int:
        epoch, position = divmod(index, self.num_sequences)
        if (
            epoch != self._epoch
        ):  # indices only grow, so one cached permutation is drawn once per epoch
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._order = generator.permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._order[position])


def sharing_sites(site: int, num_sites: int, num_domains: int) -> range:
    """The sites that read the domain of `site`, ascending: those equal to it modulo num_domains."""
    return range(site % num_domains, num_sites, num_domains)


def validation_batches(
    corpus: Corpus,
    *,
    sequence_length: int,
    num_sequences: int,
    batch_size: int,
    domain: int | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """Yields validation batches (B, S + 1) int64 in the order of the text; the last may be smaller.

    Of the W validation windows of `domain` (None: of all domains in order), takes num_sequences,
    evenly spaced (window i * W // num_sequences: the first ones alone would come from the first
    domain), or all W if there are no more. Too short a text for one sequence raises UserError, at
    once.
    """
    windows = _windows(corpus, domain, sequence_length, validation=True)
    count = min(num_sequences, len(windows))
    rows = np.arange(count) * len(windows) // count
    return (
        windows[rows[start : start + batch_size]].astype(np.int64)
        for start in range(0, count, batch_size)
    )


def _windows(
    corpus: Corpus, domain: int | None, sequence_length: int, *, validation: bool
) -> npt.NDArray[np.uint8]:
    """All whole windows as a view, uint8 (N, S + 1), N >= 1."""
    tokens = corpus.validation(domain) if validation else corpus.training(domain)
    width = sequence_length + 1
    if len(tokens) < width:
        part = "validation" if validation else "training"
        text = "corpus" if domain is None else f"domain {corpus.domains[domain].name!r}"
        raise UserError(
            f"data.paths: the {part} part of the {text} has {len(tokens)} bytes, too short for "
            f"one sequence of training.sequence_length = {sequence_length}, which takes {width}"
        )
    return tokens[: len(tokens) // width * width].reshape(-1, width)
