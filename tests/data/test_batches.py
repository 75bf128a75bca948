# SPDX-License-Identifier: Apache-2.0
"""Which sequence goes where: hand-worked order, no repetition inside an epoch, refusals."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe.data import Corpus, Domain, SiteBatches, validation_batches
from fomoe.errors import UserError

BLOCK = 8192


def numbered_corpus(num_windows: int, width: int, *letters: str) -> Corpus:
    """Domains whose training window w is the letter and w as digits, after a validation block."""
    domains = []
    for letter in letters or ("a",):
        windows = "".join(f"{letter}{w:0{width - 1}d}" for w in range(num_windows))
        domains.append(Domain(letter, ("." * BLOCK + windows).encode()))
    return Corpus(tuple(domains))


def names(batch: np.ndarray) -> list[str]:
    return [bytes(row.astype(np.uint8)).decode() for row in batch]


def sites(corpus: Corpus, num_sites: int, batch_size: int, **extra: Any) -> list[SiteBatches]:
    return [
        SiteBatches(
            corpus,
            site=site,
            num_sites=num_sites,
            batch_size=batch_size,
            sequence_length=3,
            seed=7,
            **extra,
        )
        for site in range(num_sites)
    ]


def test_the_order_is_the_permutation_read_across_sites_worked_by_hand():
    corpus = numbered_corpus(8, 4)
    order = np.random.Generator(np.random.PCG64([7, 0])).permutation(8)
    expected = [f"a{window:03d}" for window in order]
    first, second = sites(corpus, num_sites=2, batch_size=2)
    assert names(first.batch(0)) == expected[0:2]
    assert names(second.batch(0)) == expected[2:4]
    assert names(first.batch(1)) == expected[4:6]
    assert names(second.batch(1)) == expected[6:8]


def test_a_batch_is_int64_with_one_more_byte_than_the_sequence():
    batch = sites(numbered_corpus(8, 4), num_sites=1, batch_size=3)[0].batch(5)
    assert batch.shape == (3, 4)
    assert batch.dtype == np.int64


def test_no_sequence_comes_twice_in_an_epoch_over_all_sites():
    num_windows, num_sites, batch_size = 101, 3, 4
    readers = sites(numbered_corpus(num_windows, 4), num_sites, batch_size)
    seen = [
        name for step in range(26) for reader in readers for name in names(reader.batch(step))
    ]  # 312 sequences: three epochs of 101, whose ends fall inside batches, and some
    for epoch in range(3):
        counts = Counter(seen[epoch * num_windows : (epoch + 1) * num_windows])
        assert len(counts) == num_windows
        assert set(counts.values()) == {1}
    assert seen[:num_windows] != seen[num_windows : 2 * num_windows]


def test_a_step_can_be_read_again_and_without_the_ones_before():
    corpus = numbered_corpus(30, 4)
    walked, jumped = (sites(corpus, 2, 4)[1] for _ in range(2))
    batches = [names(walked.batch(step)) for step in range(9)]
    assert names(jumped.batch(8)) == batches[8]
    assert names(walked.batch(2)) == batches[2]


def test_with_a_domain_per_site_every_site_stays_in_its_own():
    corpus = numbered_corpus(12, 4, "a", "b")
    readers = sites(corpus, 3, 2, domain_per_site=True)
    letters = [{name[0] for name in names(reader.batch(0))} for reader in readers]
    assert letters == [{"a"}, {"b"}, {"a"}]
    together = [n for step in range(3) for site in (0, 2) for n in names(readers[site].batch(step))]
    assert len(set(together)) == 12
    alone = [n for step in range(6) for n in names(readers[1].batch(step))]
    assert len(set(alone)) == 12


def test_more_domains_than_sites_are_refused():
    corpus = numbered_corpus(12, 4, "a", "b", "c")
    with pytest.raises(UserError, match=r"3 domains .* got federation\.sites = 2"):
        sites(corpus, 2, 1, domain_per_site=True)


def test_a_text_too_short_for_one_sequence_is_refused():
    corpus = Corpus((Domain("tiny", b"." * BLOCK + b"ab"),))
    with pytest.raises(UserError, match=r"2 bytes, too short .*sequence_length = 3, which takes 4"):
        sites(corpus, 1, 1)
    with pytest.raises(UserError, match="validation part of the domain 'tiny'"):
        validation_batches(corpus, sequence_length=9000, num_sequences=1, batch_size=1, domain=0)


@pytest.mark.parametrize("domain_per_site", [False, True])
def test_a_resumed_run_sees_the_sequences_of_the_one_that_was_not_killed(domain_per_site: bool):
    corpus = numbered_corpus(13, 4, "a", "b")
    whole = sites(corpus, 3, 2, domain_per_site=domain_per_site)
    expected = [[names(reader.batch(step)) for reader in whole] for step in range(12)]
    readers, step = sites(corpus, 3, 2, domain_per_site=domain_per_site), 0
    for killed in (4, 5, 12):  # resumed twice
        assert expected[step:killed] == [
            [names(reader.batch(s)) for reader in readers] for s in range(step, killed)
        ]
        states = json.loads(json.dumps([reader.state() for reader in readers]))
        readers = sites(corpus, 3, 2, domain_per_site=domain_per_site, states=states)
        assert [reader.state() for reader in readers] == states
        step = killed


@pytest.mark.parametrize("domain_per_site", [False, True])
def test_no_sequence_comes_twice_in_an_epoch_when_sites_come_and_go(domain_per_site: bool):
    corpus = numbered_corpus(50, 4, "a", "b")
    states: list[Any] = []
    seen: list[str] = []
    step = 0
    for num_sites, steps in ((2, 3), (5, 2), (3, 4), (4, 9)):
        readers = sites(corpus, num_sites, 2, domain_per_site=domain_per_site, states=states)
        for s in range(step, step + steps):
            seen += [name for reader in readers for name in names(reader.batch(s))]
        step += steps
        states = [reader.state() for reader in readers]
    for letter in "ab" if domain_per_site else [""]:
        of_one_text = [name for name in seen if name.startswith(letter)]
        size = 50 if letter else 100
        assert len(of_one_text) > size
        assert len(set(of_one_text[:size])) == size


def test_a_site_that_left_out_steps_does_not_hold_the_numbering_back():
    corpus = numbered_corpus(50, 4)
    ahead, behind = sites(corpus, 2, 2)
    seen = {name for step in range(4) for name in names(ahead.batch(step))}
    seen |= set(names(behind.batch(0)))
    (alone,) = sites(corpus, 1, 2, states=[ahead.state(), behind.state()])
    assert alone.state()["step"] == 4
    assert alone.state()["sequences"] == 16
    assert not seen & set(names(alone.batch(4)))


def test_validation_sequences_are_evenly_spaced_and_in_order():
    text = "".join(f"{w:04d}" for w in range(BLOCK // 4))
    corpus = Corpus((Domain("numbers", text.encode()),))
    batches = list(validation_batches(corpus, sequence_length=3, num_sequences=5, batch_size=2))
    assert [names(batch) for batch in batches] == [["0000", "0409"], ["0819", "1228"], ["1638"]]


def test_validation_takes_all_when_there_are_no_more(tmp_path: Path):
    corpus = Corpus((Domain("numbers", b"0123456789"),))
    (batch,) = validation_batches(corpus, sequence_length=3, num_sequences=9, batch_size=9)
    assert names(batch) == ["0123", "4567"]
