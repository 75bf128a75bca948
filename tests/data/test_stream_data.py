# SPDX-License-Identifier: Apache-2.0
"""Streams as a run uses them: resumed runs see the same tokens; what is checked before training."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from document_files import numbered, text, uneven, write_jsonl, write_parquet, write_tokenizer

from fomoe.data import Batching, Source, StreamData
from fomoe.errors import UserError


def batching(num_sites: int, **settings: Any) -> Batching:
    defaults = {"batch_size": 2, "sequence_length": 15, "seed": 5, "validation_sequences": 8}
    return Batching(num_sites=num_sites, **{**defaults, "domain_per_site": False, **settings})


def data(sources: list[Source], num_sites: int, **settings: Any) -> StreamData:
    tokenizer = settings.pop("tokenizer", "")
    return StreamData(sources, tokenizer, "\n", batching(num_sites, **settings))


@pytest.fixture
def mixture(tmp_path: Path) -> list[Source]:
    (tmp_path / "c.txt").write_text("".join(f"c{i:06d}\n" for i in range(30_000)))
    (tmp_path / "a").mkdir()
    for part in range(2):
        write_jsonl(tmp_path / "a" / f"{part}.jsonl", uneven(22, "a"))
    return [
        Source(str(tmp_path / "a"), weight=3.0),
        Source(str(write_parquet(tmp_path / "b.parquet", ["x", "long " * 60, *uneven(30, "b")]))),
        Source(str(tmp_path / "c.txt"), weight=0.5),
    ]


def tokens(batches: list[Any], steps: range) -> list[list[np.ndarray]]:
    return [[site.batch(step) for site in batches] for step in steps]


@pytest.mark.parametrize(
    ("num_sites", "domain_per_site"), [(1, False), (2, False), (3, True), (4, True)]
)
def test_a_resumed_run_sees_the_tokens_of_the_one_that_was_not_killed(
    mixture: list[Source], num_sites: int, domain_per_site: bool
):
    if domain_per_site:
        mixture = [Source(source.path) for source in mixture]
    sizes = {"batch_size": 4, "sequence_length": 31, "domain_per_site": domain_per_site}
    steps = 20

    def start(states: Any = ()) -> list[Any]:
        run = pickle.loads(pickle.dumps(whole))
        return [run.batches(site, states) for site in range(num_sites)]

    whole = data(mixture, num_sites, **sizes)
    whole.check()
    sites = start()
    expected, states = [], []
    for step in range(steps):
        states.append(json.dumps([site.state() for site in sites]))
        expected += tokens(sites, range(step, step + 1))
    last = [site.state()["sources"] for site in sites]
    assert any(source["epoch"] > 0 for each in last for source in each.values())
    for step in range(0, steps, 3):
        again = tokens(start(json.loads(states[step])), range(step, steps))
        np.testing.assert_array_equal(again, expected[step:])
    twice = start(json.loads(states[4]))
    tokens(twice, range(4, 9))
    again = tokens(start([site.state() for site in twice]), range(9, steps))
    np.testing.assert_array_equal(again, expected[9:])


def test_sequences_have_the_shares_of_the_weights_on_every_site(tmp_path: Path):
    sources = [
        Source(str(write_jsonl(tmp_path / f"{letter}.jsonl", numbered(99, letter))), weight)
        for letter, weight in (("a", 6.0), ("b", 1.0), ("c", 3.0))
    ]
    run = data(sources, 2, sequence_length=3)
    for site in range(2):
        batches = run.batches(site)
        rows = np.concatenate([batches.batch(step) for step in range(25)])
        counts = Counter(text(row)[0] for row in rows)
        assert [counts[letter] for letter in "abc"] == pytest.approx([30, 5, 15], abs=2)


def test_no_document_is_seen_twice_in_an_epoch_when_sites_come_and_go(tmp_path: Path):
    names = numbered(100)
    source = Source(str(write_jsonl(tmp_path / "a.jsonl", names)))
    seen: list[str] = []
    states: list[Any] = []
    step = 0
    for num_sites, steps in ((2, 8), (3, 5), (1, 4)):
        run = data([source], num_sites, sequence_length=3)
        sites = [run.batches(site, states) for site in range(num_sites)]
        for batches in tokens(sites, range(step, step + steps)):
            seen += [text(row).strip() for batch in batches for row in batch]
        step += steps
        states = [site.state() for site in sites]
    assert states[0]["step"] == 17
    assert len(seen) == 32 + 30 + 8
    assert len(set(seen)) == len(seen)
    rest = tokens([data([source], 1, sequence_length=3).batches(0, states)], range(17, 31))
    seen += [text(row).strip() for batches in rest for row in batches[0]]
    assert Counter(seen[:95]) == Counter(name for i, name in enumerate(names) if i % 20)


def test_with_a_domain_per_site_a_site_opens_its_own_alone(tmp_path: Path):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", numbered(60, n)) for n in "ab"]
    coordinator = data(
        [Source(str(file)) for file in files], 3, sequence_length=3, domain_per_site=True
    )
    coordinator.check()
    sent = pickle.dumps(coordinator)
    files[1].unlink()
    arrived = pickle.loads(sent)
    assert {row[:1] for row in text(arrived.batches(0).batch(0)).split()} == {"a"}
    assert not set(text(arrived.batches(0).batch(0)).split()) & set(
        text(arrived.batches(2).batch(0)).split()
    )
    assert arrived.sha256 == coordinator.sha256
    windows = "".join(map(text, arrived.validation(batch_size=4)))
    assert windows.split() == ["a00", "a20", "a40", "b00", "b20", "b40"]
    with pytest.raises(UserError, match=r"data.sources\[1\]: .*b\.jsonl does not exist"):
        arrived.batches(1)


def test_a_site_with_other_files_than_the_coordinator_is_named(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", numbered(40))
    coordinator = data([Source(str(file))], 2, sequence_length=3)
    coordinator.check()
    sent = pickle.dumps(coordinator)
    write_jsonl(file, numbered(41))
    with pytest.raises(UserError, match=r"site 1 found data.sources\[0\] with SHA-256 \w{64}, bu"):
        pickle.loads(sent).batches(1)


def test_another_tokenizer_file_is_other_data(tmp_path: Path):
    tokenizer = write_tokenizer(tmp_path / "words.json")
    source = Source(str(write_jsonl(tmp_path / "a.jsonl", ["one two " * 9] * 40)))
    run = data([source], 1, tokenizer=str(tokenizer))
    run.check()
    assert run.vocab_size == 301
    assert set(run.batches(0).batch(0).ravel().tolist()) == {1, 2}
    assert run.facts().unit == "token"
    sent = pickle.dumps(run)
    tokenizer.write_text(tokenizer.read_text().replace('"two"', '"three"'))
    assert data([source], 1, tokenizer=str(tokenizer)).sha256 != run.sha256
    with pytest.raises(UserError, match=r"site 0 found data.tokenizer with SHA-256"):
        pickle.loads(sent).batches(0)


def test_validation_windows_are_shared_by_weight_and_come_in_batches(tmp_path: Path):
    sources = [
        Source(str(write_jsonl(tmp_path / f"{letter}.jsonl", numbered(400, letter))), weight)
        for letter, weight in (("a", 3.0), ("b", 1.0), ("c", 1e-6))
    ]
    run = data(sources, 1, sequence_length=3, validation_sequences=8)
    batches = [text(batch) for batch in run.validation(batch_size=5)]
    # numbered() has five bytes a document from 100 on, so windows of four go out of step there.
    assert batches == ["a00\na20\na40\na60\na80\n", "a100b00\nb20\nc00\n"]


def test_facts_count_bytes_on_disk_and_give_no_entropy(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", numbered(40))
    facts = data([Source(str(file))], 1).facts()
    assert (facts.num_bytes, facts.unit) == (file.stat().st_size, "byte")
    assert facts.bigram_entropy is None


def test_what_is_wrong_with_any_file_is_found_by_the_check(tmp_path: Path):
    good = Source(str(write_jsonl(tmp_path / "a.jsonl", numbered(200))))
    (tmp_path / "b.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"data.sources\[1\]: .* field 'text' is the number 1"):
        data([good, Source(str(tmp_path / "b.jsonl"))], 1).check()
    with pytest.raises(UserError, match="too few training documents"):
        data([good], 191, sequence_length=3).check()
    with pytest.raises(UserError, match=r"sequence_length \+ 1 = 61"):
        data([good], 1, sequence_length=60).check()
    with pytest.raises(UserError, match=r"2 sources need .*federation\.sites = 1"):
        data([good, good], 1, domain_per_site=True)
