# SPDX-License-Identifier: Apache-2.0
"""Entropies of text: what a model that knows only byte frequencies, or byte pairs, scores."""

import numpy as np
import numpy.typing as npt

__all__ = ["bigram_entropy", "unigram_entropy"]

_CHUNK = 1 << 20


def unigram_entropy(data: bytes | npt.NDArray[np.uint8]) -> float:
    """Entropy of the byte frequencies, -sum_a p(a) ln p(a), in nats per byte.

    `data` is a byte string or a uint8 array (n,), n >= 1; an empty one raises ValueError.
    """
    tokens = _tokens(data, minimum=1)
    counts = np.bincount(tokens, minlength=256)
    return _entropy(counts)


def bigram_entropy(data: bytes | npt.NDArray[np.uint8]) -> float:
    """Entropy of a byte given the one before, -sum_ab p(a,b) ln p(b|a), in nats per byte.

    Both probabilities are the frequencies in `data` itself, a byte string or a uint8 array (n,), n
    >= 2: the loss of the best model that sees one byte of context, fitted to this very text. Fewer
    bytes raise ValueError.
    """
    tokens = _tokens(data, minimum=2)
    pairs = np.zeros(256 * 256, dtype=np.int64)
    for start in range(
        0, len(tokens) - 1, _CHUNK
    ):  # chunks: an int64 copy of the whole text is 8x its size
        chunk = tokens[start : start + _CHUNK + 1].astype(np.int64)
        pairs += np.bincount(chunk[:-1] * 256 + chunk[1:], minlength=256 * 256)
    first = pairs.reshape(256, 256).sum(axis=1)
    return _entropy(pairs) - _entropy(first)


def _tokens(data: bytes | npt.NDArray[np.uint8], *, minimum: int) -> npt.NDArray[np.uint8]:
    tokens = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
    if len(tokens) < minimum:
        raise ValueError(f"entropy: data must hold at least {minimum} byte(s), got {len(tokens)}")
    return tokens


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
