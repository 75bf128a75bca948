# SPDX-License-Identifier: Apache-2.0
"""`fomoe train` under torchrun on four machines joined by slow links, and what crossed them.

The machines are network namespaces, so this needs root; see links.py. Each strategy trains the
demo's model for a few rounds. Bytes are TCP's payload, read from the header of every frame on the
link, retransmissions apart; the ledger's are those of its classes that cross links (`evaluation` is
read from files). Start and end of a run, which the ledger leaves out, are in the bytes.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from links import Link, Machines, machines

import fomoe.demo
from fomoe.bench.machine import versions
from fomoe.federation.ledger import EXCHANGE_CLASSES

SITES = 4
STRATEGIES = {
    "ddp": ["federation.strategy=ddp", f"federation.overlap={SITES}"],
    "ep": ["federation.strategy=ep", "federation.overlap=1"],
    "diloco": ["federation.strategy=diloco", f"federation.overlap={SITES}"],
    "fomoe": [],
    "fomoe int8": ["federation.codec=int8"],
}
_PORT = 29500
_TOLERANCE = 0.03
_CONFIGURATION = Path(fomoe.demo.__file__).with_name("demo.toml")


def run_strategy(
    net: Machines, name: str, rounds: int, overrides: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Train, and compare the link with the ledger."""
    run = folder / name.replace(" ", "-")
    settings = [
        *STRATEGIES[name], f"federation.rounds={rounds}", "training.threads=1",
        "evaluation.every=0", f"run.folder={run}", *overrides,
    ]  # fmt: skip
    before = net.traffic()
    with contextlib.ExitStack() as stack:
        sites = [
            stack.enter_context(_site(net, site, settings, folder / f"{run.name}-{site}.log"))
            for site in range(SITES)
        ]
        for site, process in enumerate(sites):
            if process.wait() != 0:
                log = (folder / f"{run.name}-{site}.log").read_text()
                raise SystemExit(f"{name}: site {site} failed:\n{log[-3000:]}")
    after = net.traffic()
    sent = [
        {key: late[key] - early[key] for key in late}
        for early, late in zip(before, after, strict=True)
    ]
    return {"strategy": name, "settings": settings[:-1], **_compared(run, sent)}


@contextlib.contextmanager
def _site(net: Machines, site: int, settings: Sequence[str], log: Path) -> Any:
    command = net.command(
        site, sys.executable, "-m", "torch.distributed.run", f"--nnodes={SITES}",
        f"--node-rank={site}", "--nproc-per-node=1", f"--master-addr={net.address(0)}",
        f"--master-port={_PORT}", "-m", "fomoe", "train", "--config", str(_CONFIGURATION),
        *settings,
    )  # fmt: skip
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": net.interface(site),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def _compared(run: Path, sent: Sequence[dict[str, int]]) -> dict[str, Any]:
    rounds = [line for line in _lines(run / "metrics.jsonl") if line["kind"] == "round"]
    ledger: dict[str, int] = {}
    for line in _lines(run / "ledger.jsonl"):
        if line["class"] in (*EXCHANGE_CLASSES, "metrics"):
            ledger[line["class"]] = ledger.get(line["class"], 0) + line["bytes"]
    total = sum(ledger.values())
    link = sum(each["payload_bytes"] - each["retransmitted_bytes"] for each in sent)
    later = rounds[1:] or rounds  # the first one warms up
    return {
        "rounds": len(rounds),
        "seconds_per_round": statistics.median(r["seconds"] for r in later),
        "exchange_seconds_per_round": statistics.median(r["exchange_seconds"] for r in later),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in later),
        "ledger_bytes": total,
        "ledger_bytes_by_class": ledger,
        "link_payload_bytes": link,
        "link_over_ledger": link / total,
        "frames": sum(each["frames"] for each in sent),
        "frame_bytes": sum(each["frame_bytes"] for each in sent),
        "retransmitted_bytes": sum(each["retransmitted_bytes"] for each in sent),
        "dropped_frames": sum(each["dropped_frames"] for each in sent),
        "sent_by_site": list(sent),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'':<12}{'s/round':>9}{'exchange':>10}{'tokens/s':>10}"
        f"{'ledger MB':>11}{'link MB':>9}{'link/ledger':>13}{'again MB':>10}"
    )
    for result in results:
        print(
            f"{result['strategy']:<12}{result['seconds_per_round']:9.2f}"
            f"{result['exchange_seconds_per_round']:10.2f}{result['tokens_per_second']:10.0f}"
            f"{result['ledger_bytes'] / 1e6:11.2f}{result['link_payload_bytes'] / 1e6:9.2f}"
            f"{result['link_over_ledger']:13.4f}{result['retransmitted_bytes'] / 1e6:10.2f}"
        )


def plot(results: Sequence[dict[str, Any]], link: Link, path: Path) -> None:
    """Seconds of a round, computing and exchanging, by strategy."""
    from fomoe.federation.report.svg import new_figure, style, to_svg

    names = [result["strategy"] for result in results]
    exchanging = [result["exchange_seconds_per_round"] for result in results]
    computing = [
        result["seconds_per_round"] - seconds
        for result, seconds in zip(results, exchanging, strict=True)
    ]
    with style():
        figure, (axes,) = new_figure(1, height=2.6)
        axes.barh(names, computing, color="#94a3b8", label="everything else")
        axes.barh(names, exchanging, left=computing, color="#0f766e", label="exchange")
        axes.invert_yaxis()
        figure.set_facecolor("white")
        axes.set_xlabel(
            f"seconds per round, four sites, {link.rate / 1e6:.0f} Mbit/s, "
            f"{link.delay * 1e3:.0f} ms one way"
        )
        axes.legend()
        path.write_text(to_svg(figure, "wan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=100.0, help="of every link, both ways")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="from any machine to another")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="SVG; needs fomoe[report]")
    parser.add_argument(
        "override", nargs="*", help="settings, for example federation.local_steps=4"
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up then, too
    link = Link(rate=arguments.mbit * 1e6, delay=arguments.delay_ms / 1e3)
    results = []
    with machines(SITES, link) as net, tempfile.TemporaryDirectory() as folder:
        for name in STRATEGIES:
            results.append(
                run_strategy(net, name, arguments.rounds, arguments.override, Path(folder))
            )
            print(f"{name}: done", file=sys.stderr)
    print_table(results)
    if arguments.output:
        about = {
            "benchmark": "wan",
            "sites": SITES,
            "link_bits_per_second": link.rate,
            "link_delay_seconds": link.delay,
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control")
            .read_text()
            .strip(),
            "load_average": os.getloadavg()[0],
            "versions": versions(),
        }
        arguments.output.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    if arguments.plot:
        plot(results, link, arguments.plot)
    worst = max(results, key=lambda result: abs(result["link_over_ledger"] - 1))
    if abs(worst["link_over_ledger"] - 1) > _TOLERANCE:
        raise SystemExit(
            f"{worst['strategy']}: the link carried {worst['link_over_ledger']:.3f} times what the "
            f"ledger says; expected within {_TOLERANCE:.0%}"
        )


if __name__ == "__main__":
    main()
