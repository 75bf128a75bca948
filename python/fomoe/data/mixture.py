# SPDX-License-Identifier: Apache-2.0
"""Which source the next sequence comes from, and the batches of a site that result.

Sequence n of a site comes from the source in whose interval the point u_n falls, the intervals
dividing [0, 1) by weight and u_n = u_0 + n * 0.618... modulo 1 (a Kronecker sequence; our choice).
So every stretch of sequences has the shares of the weights up to a few sequences, and n is all
there is to save. u_0 comes from seed and site, so that sites do not take turns alike.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fomoe.data.streams import TokenStream

__all__ = ["Mixture", "StreamBatches"]

_ONE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 times the golden ratio less one: exact in integers for any n


class Mixture:
    """The choice of source for every sequence of one site. `weights` are positive, any scale."""

    def __init__(self, weights: Sequence[float], *, seed: int, site: int) -> None:
        total = sum(weights)
        self._bounds = [int(part / total * _ONE) for part in itertools.accumulate(weights)]
        self._bounds[-1] = _ONE  # whatever the sum was rounded to
        digest = hashlib.sha256(f"{seed}:mixture:{site}".encode()).digest()
        self._first = int.from_bytes(digest[:8], "big")

    def choose(self, sequence: int) -> int:
        """Index of the source of the site's 0-based sequence."""
        point = (self._first + sequence * _GOLDEN) % _ONE
        return next(i for i, bound in enumerate(self._bounds) if point < bound)


class StreamBatches:
    """Training batches of one site that reads streams.

    Parameters
    ----------
    streams
        By index of the source: all sources, or the site's one with domain_per_site.
    mixture
        Chooses among the streams in their order.
    step, sequences
        The first step to be asked for, and the sequences seen before it.
    """

    def __init__(
        self,
        streams: Mapping[int, TokenStream],
        mixture: Mixture,
        *,
        batch_size: int,
        sequence_length: int,
        step: int = 0,
        sequences: int = 0,
    ) -> None:
        self._streams = streams
        self._order = list(streams)
        self._mixture = mixture
        self._batch_size = batch_size
        self._width = sequence_length + 1
        self._step = step
        self._sequences = sequences

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Tokens (B, S + 1) int64 of 0-based `step`: inputs [:, :-1], targets [:, 1:].

        Steps are asked for in order; those left out are read and dropped.

        Raises
        ------
        ValueError
            The step has been read already.
        """
        if step < self._step:
            raise ValueError(f"batch: step must be at least {self._step}, got {step}")
        while self._step < step:
            self._read()
        return self._read()

    def state(self) -> dict[str, Any]:
        """The cursor, as JSON-able values."""
        sources = {str(index): stream.state() for index, stream in self._streams.items()}
        return {"step": self._step, "sequences": self._sequences, "sources": sources}

    def _read(self) -> npt.NDArray[np.int64]:
        rows = []
        for _ in range(self._batch_size):
            stream = self._streams[self._order[self._mixture.choose(self._sequences)]]
            rows.append(stream.take(self._width))
            self._sequences += 1
        self._step += 1
        return np.stack(rows)
