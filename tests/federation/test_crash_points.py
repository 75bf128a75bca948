# SPDX-License-Identifier: Apache-2.0
"""Kill -9 at any instant, then --resume: the run ends as the one that was not killed, bit for bit.

A whole federation in one process, its sites in threads that take turns, is recorded: every change
of a file, every call of the transport, every message. What a kill or a power failure leaves at an
instant follows from the record (see recorded_disk), so every instant can be tried. Many leave the
same files, and how a run goes on depends on nothing else: each such set is tried once.

By default a part of all instants is tried, among them always those around the steps of a commit;
FOMOE_ALL_CRASH_POINTS=1 tries every one.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from in_process import ThreadTransport, Turns, run_sites
from nano_task import NanoTask, nano, settings
from recorded_disk import CRASHES, Change, Disk, Killed, Recorder, Tree, read_tree, write_tree
from torch.distributed import HashStore

from fomoe.errors import UserError
from fomoe.federation.checkpoint import find_checkpoint, incomplete_folder
from fomoe.federation.config import Config
from fomoe.federation.launch.channel import decode
from fomoe.federation.launch.coordinator import Coordinator
from fomoe.federation.launch.heartbeat import Heartbeat
from fomoe.federation.launch.opening import Opening, begin, go_on
from fomoe.federation.launch.rounds import WatchedTransport, run_rounds
from fomoe.federation.run_folder import RunFolder, run_to_resume
from fomoe.federation.site import Site

ALL = os.environ.get("FOMOE_ALL_CRASH_POINTS") == "1"
pytestmark = pytest.mark.timeout(0 if ALL else 120)
NANO = nano.Config(
    sites=3, overlap=1, rounds=3, local_steps=2, warmup=1, num_experts=6, top_k=1, dim=16,
    expert_dim=8, placement="random", moved_warmup_steps=5,
)  # fmt: skip
VARIANTS = [("fp32", 1, 0), ("int8", 2, 1)] + [("fp32", 2, 1), ("int8", 1, 0)] * ALL
"""codec, keep_checkpoints, full_replica_rounds; a checkpoint after every round."""
Variant = tuple[str, int, int]


class CountingTask(NanoTask):
    """Its data cursor is a digest of all that the site has read: the order of the data."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.read: dict[int, str] = {}

    def batch(self, site: int, step: int) -> torch.Tensor:
        tokens = super().batch(site, step)
        seen = self.read.get(site, "") + str(tokens.tolist())
        self.read[site] = hashlib.sha256(seen.encode()).hexdigest()
        return tokens

    def data_state(self, site: int) -> dict[str, Any]:
        return {"read": self.read[site]}

    def load_data_state(self, states: Any) -> None:
        self.read = {site: state["read"] for site, state in enumerate(states)}


def config_of(run: Path, variant: Variant) -> Config:
    codec, keep, full_rounds = variant
    nano_config = dataclasses.replace(NANO, codec=codec, full_replica_rounds=full_rounds)
    values = settings(nano_config, run).to_dict()
    values["run"] |= {"checkpoint_every": 1, "keep_checkpoints": keep}
    values["evaluation"] |= {"every": 2}
    return Config.from_dict(values)


# ---- a federation in this process ------------------------------------------------------------


class DirectChannel:
    """To a coordinator in the same process."""

    files_travel = False

    def __init__(
        self, transport: ThreadTransport, coordinator: Coordinator, recorder: Recorder
    ) -> None:
        self.transport, self.coordinator, self.recorder = transport, coordinator, recorder
        self.files = incomplete_folder(coordinator.folder.path)

    def transmit(self, message: bytes) -> None:
        self.recorder.note("message")
        self.coordinator.receive(self.transport.site, decode(message))

    def end_round(self, records: Any) -> None:
        if records:
            self.transport.network.barrier.wait()


def follow(opening: Opening, recorder: Recorder) -> None:
    """As the launcher does, but that the sites are threads."""
    coordinator = Coordinator(
        opening, CountingTask(NANO), lambda path: recorder.note("announced", Path(path).name)
    )
    turns = Turns(NANO.sites)

    def work(transport: ThreadTransport) -> None:
        turns.begin(transport.site)
        task = CountingTask(NANO)
        heartbeat = Heartbeat(HashStore(), transport.site, {}, 1.0, "", lambda loss: None)
        watched = WatchedTransport(transport, heartbeat)
        site = Site(opening.config, task, watched, opening.checkpoint)
        channel = DirectChannel(transport, coordinator, recorder)
        run_rounds(site, channel, heartbeat, opening.first_round)
        turns.end()

    with coordinator:
        run_sites(NANO.sites, work, lambda site: lambda: recorder.note("transport"), barrier=turns)
    coordinator.finish()


def train(root: Path, variant: Variant, stop: int | None = None) -> Recorder:
    """Begin a run in ``root / "run"``, or go on with it: what a user does after any crash."""
    run, recorder = root / "run", Recorder(root, stop)
    config, task = config_of(run, variant), CountingTask(NANO)
    with recorder.recording() as patch:
        patch.setattr("fomoe.federation.summary.source_commit", lambda: "as it is now")
        try:
            path = run_to_resume(run)
        except UserError:
            with RunFolder(run) as folder:
                follow(begin(config, task, folder), recorder)
            return recorder
        with RunFolder(path) as folder:
            opening = go_on(config, task, folder, threads=1)
            if opening.summary is None:
                follow(opening, recorder)
    return recorder


TIMINGS = {"seconds", "tokens_per_second", "exchange_seconds", "peak_rss", "folder"}


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k not in TIMINGS}
    return [without_timings(v) for v in value] if isinstance(value, list) else value


def outcome(root: Path) -> dict[str, Any]:
    """All that is in the run folder at the end, but for timings."""
    found: dict[str, Any] = read_tree(root / "run")
    for name, content in found.items():
        if name.endswith(("manifest.json", "summary.json")):
            found[name] = without_timings(json.loads(content))
        elif name == "metrics.jsonl":
            found[name] = [without_timings(json.loads(line)) for line in content.splitlines()]
    return found


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    missing, left_over = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    assert not missing | left_over, f"missing: {sorted(missing)}, left over: {sorted(left_over)}"
    different = {name: (actual[name], expected[name]) for name in expected}
    different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
    assert not different, {name: next(differences(*pair)) for name, pair in different.items()}


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}[{index}]")
    elif one != other:
        yield f"{place}: {str(one)[:200]} and {str(other)[:200]}"


# ---- crashes ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    recorder: Recorder
    outcome: dict[str, Any]


@cache
def undisturbed(variant: Variant) -> Undisturbed:
    with TemporaryDirectory() as root:
        return Undisturbed(train(Path(root), variant), outcome(Path(root)))


@dataclasses.dataclass(frozen=True)
class Remains:
    """Files that a crash leaves; ``announced`` is the last checkpoint that had been completed."""

    tree: Tree
    announced: str
    instant: int
    crash: str
    place: tuple[str, str, bool]
    """The last change, whatever round and site, and whether there was a checkpoint."""
    steps: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)
    """Steps of a commit, whatever round, that a crash before or after leaves these files."""


def place_of(change: Change | None, announced: str) -> tuple[str, str, bool]:
    name = re.sub(r"\d+", "N", change.path) if change else ""
    return change.kind if change else "", name, bool(announced)


def is_step_of_a_commit(change: Change | None) -> bool:
    """Any rename or sync that makes or removes a checkpoint, and the word that there is one."""
    if change is None or change.path.endswith(".safetensors"):
        return False
    is_on_disk = change.kind in ("rename", "sync") and change.path.startswith("run/checkpoints")
    return is_on_disk or change.path == "announced"


def remains(recorder: Recorder, before: Tree, announced: str = "") -> list[Remains]:
    """Every different set of files that a crash may leave."""
    disk, found = Disk(before), {}
    for instant, (change, following) in enumerate(pairwise([None, *recorder.changes, None])):
        if change is not None:
            disk.apply(change)
            if change.path == "announced":
                announced = change.value
        place = place_of(change, announced)
        for crash in CRASHES:
            tree = disk.left(crash, instant)
            key = frozenset(tree.items()), announced
            left = found.setdefault(key, Remains(tree, announced, instant, crash, place))
            for when, step in (("after", change), ("before", following)):
                if is_step_of_a_commit(step):
                    left.steps.add((when, place_of(step, announced), crash))
    return list(found.values())


def check(left: Remains, variant: Variant, expected: dict[str, Any]) -> Recorder:
    """What is left becomes the run that was not disturbed."""
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_tree(left.tree, root)
        if left.announced:
            assert find_checkpoint(root / "run").name >= left.announced
        is_finished = "run/summary.json" in left.tree
        if is_finished:
            with pytest.raises(UserError, match="has completed 3 rounds already"):
                train(root, variant)
        recorder = Recorder(root) if is_finished else train(root, variant)
        assert_same(outcome(root), expected)
    return recorder


def around_commits(remains: list[Remains]) -> list[Remains]:
    """What every crash leaves just before and after every step of a commit, of one round each."""
    by_step: dict[Any, int] = {}
    for index, left in enumerate(remains):
        by_step |= dict.fromkeys(left.steps - by_step.keys(), index)
    return [remains[index] for index in sorted(set(by_step.values()))]


def some(remains: list[Remains], every: int, first: int = 0) -> list[Remains]:
    """One of every place, each time another one of the crashes there; of these every n-th."""
    if ALL:
        return remains
    by_place: dict[Any, list[Remains]] = {}
    for left in remains:
        by_place.setdefault(left.place, []).append(left)
    chosen = [found[7 * number % len(found)] for number, found in enumerate(by_place.values())]
    return chosen[first::every]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_run_killed_at_any_instant_ends_as_if_it_had_not_been(variant):
    whole = undisturbed(variant)
    for left in some(remains(whole.recorder, {}), every=3, first=VARIANTS.index(variant) % 3):
        check(left, variant, whole.outcome)


@pytest.mark.parametrize("variant", VARIANTS[:1], ids=str)
def test_so_does_a_run_killed_around_any_step_of_a_commit(variant):
    """Its first checkpoint, and one that takes the place of another."""
    whole = undisturbed(variant)
    for left in around_commits(remains(whole.recorder, {})):
        check(left, variant, whole.outcome)


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_so_does_a_run_that_is_killed_again_while_it_goes_on(variant, tmp_path):
    whole = undisturbed(variant)
    firsts = [left for left in remains(whole.recorder, {}) if left.announced]
    for first in firsts[:: len(firsts) // (9 if ALL else 2) + 1]:
        resumed = check(first, variant, whole.outcome)
        for second in some(remains(resumed, first.tree, first.announced), every=12):
            check(second, variant, whole.outcome)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_the_record_says_what_a_process_leaves_that_ends_there(share, tmp_path):
    """Here every thread really ends at the instant, and cleans nothing up."""
    whole = undisturbed(VARIANTS[0])
    stop = int(share * len(whole.recorder.changes))
    disk = Disk({})
    with pytest.raises(Killed):
        train(tmp_path, VARIANTS[0], stop)
    for change in whole.recorder.changes[:stop]:
        disk.apply(change)
    left = disk.left("kill")
    assert left.keys() == read_tree(tmp_path).keys()
    for name, content in read_tree(tmp_path).items():
        if name.endswith("safetensors"):  # the others have timings in them
            assert content == left[name]


def test_the_record_of_a_whole_run_is_the_folder_at_its_end(tmp_path):
    disk = Disk({})
    for change in train(tmp_path, VARIANTS[0]).changes:
        disk.apply(change)
    assert disk.left("kill") == read_tree(tmp_path)
    synced = disk.left("nothing unsynced")
    assert [name for name, content in read_tree(tmp_path).items() if synced[name] != content] == []
