# SPDX-License-Identifier: Apache-2.0
"""Mixtures: the share of every source, and batches that come in order."""

from collections import Counter
from pathlib import Path

import pytest
from document_files import numbered, opened, text, write_jsonl

from fomoe.data.mixture import Mixture, StreamBatches
from fomoe.data.streams import TokenStream
from fomoe.data.tokenization import ByteTokens


def chosen(weights: list[float], count: int, *, first: int = 0, site: int = 0) -> list[int]:
    mixture = Mixture(weights, seed=3, site=site)
    return [mixture.choose(sequence) for sequence in range(first, first + count)]


def test_equal_weights_alternate_as_the_golden_ratio_does_worked_by_hand():
    mixture = Mixture([1, 1], seed=3, site=0)
    mixture._first = 0  # u = 0, .618, .236, .854, .472, .090, .708, .326, .944, .562
    assert [mixture.choose(n) for n in range(10)] == [0, 1, 0, 1, 0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.7, 0.2, 0.1], [5, 1e-3], [1] * 7])
def test_every_stretch_has_the_shares_of_the_weights(weights: list[float]):
    for first in (0, 12_345, 10**12):
        counts = Counter(chosen(weights, 3000, first=first))
        for source, weight in enumerate(weights):
            assert counts[source] == pytest.approx(3000 * weight / sum(weights), abs=4)


def test_sites_do_not_take_turns_alike_and_a_seed_repeats():
    assert chosen([1, 1, 1], 50, site=0) != chosen([1, 1, 1], 50, site=1)
    assert chosen([1, 1, 1], 50) == chosen([2, 2, 2], 50)


def test_a_batch_is_read_in_order_and_steps_left_out_are_dropped(tmp_path: Path):
    documents = opened(write_jsonl(tmp_path / "a.jsonl", numbered(21)))

    def batches() -> StreamBatches:
        stream = TokenStream(documents, ByteTokens("\n"), rank=0, num_ranks=1)
        mixture = Mixture([1], seed=0, site=0)
        return StreamBatches({0: stream}, mixture, batch_size=2, sequence_length=3)

    walked, jumped = batches(), batches()
    assert text(walked.batch(0)[0]) == "d01\n"
    assert text(walked.batch(1)) == "d03\nd04\n"
    assert walked.batch(2).shape == (2, 4)
    assert walked.batch(3).dtype == "int64"
    assert text(jumped.batch(1)) == "d03\nd04\n"
    jumped.batch(3)
    assert jumped.state() == walked.state()
    with pytest.raises(ValueError, match="step must be at least 4, got 3"):
        walked.batch(3)
