# SPDX-License-Identifier: Apache-2.0
"""The HTML report, from run folders made up here."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fomoe.errors import UserError
from fomoe.federation import report
from fomoe.federation.report import read_runs, render, tables, write_report
from fomoe.units import human_bytes

SITES, ROUNDS, LOCAL_STEPS, LAYERS, EXPERTS = 4, 12, 20, 4, 16
SHARED, EXPERT = 400_000, 1_600_000  # parameters


def make_run(folder: Path, strategy: str, overlap: int = SITES, **changes: Any) -> Path:
    """Writes a run as the trainer would: plausible losses, exact bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(strategy))
    exchanges = LOCAL_STEPS if strategy == "ddp" else 1
    traffic = {
        "shared": exchanges * 2 * (SITES - 1) * SHARED * 4,
        "expert": exchanges * 2 * (overlap - 1) * EXPERT * 4,
        "tokens": 4_000,
    }
    to_coordinator = {"metrics": 8_000, "evaluation": 1_000_000}
    floor = {"ddp": 1.70, "diloco": 1.80, "fomoe": 1.84}.get(strategy, 1.9)
    metrics: list[dict[str, Any]] = []
    ledger: list[dict[str, Any]] = []
    for round_ in range(ROUNDS):
        losses = np.empty((LOCAL_STEPS, SITES))
        for local in range(LOCAL_STEPS):
            step = round_ * LOCAL_STEPS + local
            losses[local] = floor + 3.7 * np.exp(-step / 35) + random.normal(0, 0.05, SITES)
            metrics.append(
                {"kind": "step", "step": step, "losses": losses[local].tolist(), "lr": 1e-3}
            )
        metrics.append(make_round(random, round_, traffic, overlap))
        if round_ % 3 == 2:
            loss = float(losses.mean()) + 0.03
            site_losses = [loss + 0.02] * SITES
            evaluation = {"round": round_, "loss": loss, "site_losses": site_losses}
            metrics.append({"kind": "evaluation", **evaluation})
        ledger += [
            {"round": round_, "site": site, "class": name, "bytes": size // SITES, "tokens": 40960}
            for site in range(SITES)
            for name, size in (traffic | to_coordinator).items()
        ]
    summary = make_summary(strategy, overlap, traffic, to_coordinator, evaluation)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "ledger.jsonl", ledger)
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def make_summary(
    strategy: str,
    overlap: int,
    traffic: dict[str, int],
    to_coordinator: dict[str, int],
    evaluation: dict[str, Any],
) -> dict[str, Any]:
    held = SHARED + EXPERT * overlap // SITES
    memory = {"parameters": 4 * held, "gradients": 4 * held, "optimizer": 8 * held}
    memory["exchange_buffers"] = 4 * held
    memory |= {} if strategy == "ddp" else {"round_start": 4 * held, "outer_momentum": held}
    return {
        "strategy": strategy,
        "sites": SITES,
        "overlap": overlap,
        "local_steps": LOCAL_STEPS,
        "rounds": ROUNDS,
        "seed": 0,
        "commit": "0123456789abcdef0123",
        "corpus_sha256": "9f86d081884c7d659a2feaa0c55ad015",
        "corpus_bytes": 10_736_457,
        "token": "byte",
        "unigram_entropy": 3.277,
        "bigram_entropy": 2.456,
        "loss": evaluation["loss"],
        "site_losses": evaluation["site_losses"],
        "tokens_per_second": 5321.0,
        "ghost_share": 1 - overlap / SITES + (0.004 if overlap < SITES else 0),
        "routing_findings": [],
        "bytes_per_site": [ROUNDS * sum(traffic.values()) // SITES] * SITES,
        "bytes_by_class": {
            name: ROUNDS * size for name, size in (traffic | to_coordinator).items()
        },
        "memory_per_site": [{**memory, "peak_rss": 410_000_000 + 16 * held}] * SITES,
        "parameters": SHARED + EXPERT,
        "parameters_per_site": [held] * SITES,
        "seconds": 61.3,
    }


def make_round(
    random: np.random.Generator,
    round_: int,
    traffic: dict[str, int],
    overlap: int,
) -> dict[str, Any]:
    routing = []
    for layer in range(LAYERS):
        load = random.dirichlet(np.full(EXPERTS, 4.0 + 2 * round_ + 3 * layer))
        entropy = float(-(load * np.log(load)).sum() / np.log(EXPERTS))
        routing.append(
            {
                "layer": layer,
                "load_entropy": entropy,
                "load_variation": float(load.std() / load.mean()),
                "dead_experts": 0,
                "ghost_share": 1 - overlap / SITES,
                "even_ghost_share": 1 - overlap / SITES,
                "sites": {
                    "load_entropy": [entropy] * SITES,
                    "load_variation": [float(load.std() / load.mean())] * SITES,
                    "dead_experts": [0, 1, 0, 0],
                    "ghost_share": [1 - overlap / SITES] * SITES,
                },
                "load": (load * 20480).tolist(),
            }
        )
    return {
        "kind": "round",
        "round": round_,
        "tokens": (round_ + 1) * 40960 * SITES,
        "tokens_per_second": 5321.0,
        "ghost_share": 1 - overlap / SITES,
        "bytes": traffic,
        "bytes_total": (round_ + 1) * sum(traffic.values()),
        "routing": routing,
    }


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Ids, addresses and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report_page(runs: list[Path], folder: Path) -> Page:
    output = folder / "new" / "report.html"
    write_report(runs, output)
    assert [file.name for file in output.parent.iterdir()] == ["report.html"]
    return Page(output.read_text("utf-8"))


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / "ddp", "ddp"),
        make_run(folder / "diloco", "diloco"),
        make_run(folder / "fomoe", "fomoe", overlap=2),
    ]


@pytest.fixture(scope="module")
def page(three_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report_page(three_runs, tmp_path_factory.mktemp("report"))


def test_numbers_worked_by_hand_are_in_the_table(page: Page):
    # fomoe sends per site and round (2*3*0.4 M + 2*1*1.6 M) * 4 bytes / 4 sites + 1 kB, 12 times.
    assert human_bytes(12 * (5_600_000 + 1_000)) == "67.2 MB"
    assert "67.2 MB" in page.text
    assert "diloco sends 20.0x fewer bytes than ddp." in page.text
    assert "fomoe sends 53.3% fewer bytes than diloco" in page.text
    assert "50.4% (even: 50%)" in page.text
    assert "Every run ends below the text's bigram entropy." in page.text


def test_the_page_refers_to_nothing_outside_and_ids_are_unique(page: Page):
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        inside = address.startswith("#") and address[1:] in page.ids
        assert inside or address.startswith("data:image/png;base64,"), address
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(page.ids)
    assert not re.search(r"url\((?!#)", page.source)


def test_the_same_runs_give_the_same_page(page: Page, three_runs: list[Path]):
    assert render(read_runs(three_runs)) == page.source


def test_every_plot_is_there_with_its_units(page: Page):
    for words in (
        "Loss against steps",
        "optimizer steps",
        "loss (nats per byte)",
        "bytes sent per site (log scale)",
        "bigram entropy",
        "tensor bytes per site",
        "load entropy",
        "load variation",
        "dead experts",
        "ghost share",
        "layer 3",
        "site 3",
        "load of the last round (1 = even share)",
    ):
        assert words in page.text


def test_a_single_site_without_traffic_has_a_report(tmp_path: Path):
    run = make_run(
        tmp_path / "alone",
        "diloco",
        sites=1,
        overlap=1,
        bytes_per_site=[0],
        bytes_by_class={},
        memory_per_site=[{"parameters": 10, "peak_rss": 100}],
        parameters_per_site=[2_000_000],
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "round":
            line.update(bytes={}, bytes_total=0)
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "ledger.jsonl", [])
    assert "The run ends below" in report_page([run], tmp_path).text


def test_doubtful_numbers_are_said(tmp_path: Path):
    runs = [
        make_run(tmp_path / "ddp", "ddp", loss=2.6),
        make_run(tmp_path / "diloco", "diloco", seed=1),
    ]
    ledger = runs[1] / "ledger.jsonl"
    write_lines(ledger, [json.loads(line) for line in ledger.read_text().splitlines()[1:]])
    seed, bytes_ = tables.warnings(read_runs(runs))
    assert seed == "The runs differ in seed: compare with care."
    assert bytes_.startswith("diloco: the ledger's lines of class shared add up to")
    assert tables.findings(read_runs(runs))[-1] == "Not below the text's bigram entropy: ddp."


def test_findings_of_the_routing_are_named_and_marked(tmp_path: Path):
    finding = {"kind": "skipping", "site": None, "value": 0.3, "expected": 0.5}
    findings = [
        finding | {"layer": layer, "round": 4 + layer, "sentence": f"layer {layer} is unbalanced"}
        for layer in (1, 2, 3)
    ] + [finding | {"kind": "uneven_load", "layer": 0, "round": 9, "sentence": "layer 0 too"}]
    calm = make_run(tmp_path / "calm", "diloco")
    run = make_run(tmp_path / "run", "fomoe", overlap=2, routing_findings=findings)
    assert tables.warnings(read_runs([calm, run])) == [
        "fomoe, round 5: layer 1 is unbalanced. The same in 2 more layers: 2, 3.",
        "fomoe, round 9: layer 0 too.",
    ]
    page = report_page([calm, run], tmp_path)
    assert "fomoe, round 5: layer 1 is unbalanced. The same in 2 more layers: 2, 3." in page.text
    assert page.text.count("Crosses: findings, with their layer.") == 1


def test_a_warning_among_the_metrics_is_read(tmp_path: Path):
    run = make_run(tmp_path / "run", "ddp")
    warning = {"kind": "warning", "round": 1, "sentence": "layer 0 is unbalanced"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(warning) + "\n")
    assert len(read_runs([run])[0].rounds) == ROUNDS


def test_two_runs_of_one_strategy_are_told_apart_by_folder_whose_name_is_no_markup(tmp_path: Path):
    folders = [make_run(tmp_path / name, "fomoe", overlap=n) for n, name in ((1, "<b>"), (2, "y"))]
    assert [run.label for run in read_runs(folders)] == ["fomoe (<b>)", "fomoe (y)"]
    source = report_page(folders, tmp_path).source
    assert "fomoe (<b>)" not in source
    assert "fomoe (&lt;b&gt;)" in source


def test_what_is_missing_in_a_run_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"run folder .*absent does not exist"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(UserError, match=r"summary\.json does not exist: has the run finished\?"):
        read_runs([tmp_path])
    run = make_run(tmp_path / "run", "ddp")
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 0, "losses": [1]}\n{"kind": "st')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is no JSON"):
        read_runs([run])
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 has no 'losses'"):
        read_runs([run])
    (run / "summary.json").write_text('{"strategy": "ddp"}')
    with pytest.raises(UserError, match=r"summary\.json has no 'sites'"):
        read_runs([run])
    with pytest.raises(UserError, match="at least one run folder"):
        read_runs([])


def test_a_missing_extra_names_itself(
    three_runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for part in ("plots", "routing_plots", "svg"):
        monkeypatch.delitem(sys.modules, f"fomoe.federation.report.{part}", raising=False)
        monkeypatch.delattr(report, part, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib.*pip install 'fomoe\[report\]'"):
        write_report(three_runs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
