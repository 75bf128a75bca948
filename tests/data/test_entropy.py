# SPDX-License-Identifier: Apache-2.0
"""Entropies of byte strings, against values worked by hand."""

import math

import numpy as np
import pytest

from fomoe.data import bigram_entropy, unigram_entropy


def test_unigram_entropy_of_abab_is_one_bit():
    assert unigram_entropy(b"abab") == pytest.approx(math.log(2))


def test_bigram_entropy_of_aabab_worked_by_hand():
    # Pairs aa, ab, ba, ab. After a (3 times): a 1/3, b 2/3; after b (once): always a.
    after_a = math.log(3) - 2 / 3 * math.log(2)
    assert bigram_entropy(b"aabab") == pytest.approx(3 / 4 * after_a)


def test_bigram_entropy_is_zero_when_one_byte_fixes_the_next():
    assert bigram_entropy(b"abcabcabc") == pytest.approx(0.0, abs=1e-12)


def test_entropies_of_uniform_random_bytes_reach_eight_bits():
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
    assert unigram_entropy(data) == pytest.approx(8 * math.log(2), abs=1e-3)
    assert bigram_entropy(data) == pytest.approx(8 * math.log(2), abs=2e-2)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    data = b"the quick brown fox jumps over the lazy dog " * 3
    whole = bigram_entropy(data)
    monkeypatch.setattr("fomoe.data.entropy._CHUNK", 7)
    assert bigram_entropy(data) == whole


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match="at least 2 byte"):
        bigram_entropy(b"a")
