# SPDX-License-Identifier: Apache-2.0
"""The plot of docs/results/first-federation.md, from the run folders.

python bench/studies/first_federation_plot.py FOLDER plot.svg     # FOLDER/fomoe, diloco, ddp
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from fomoe.federation.report.svg import format_bytes_axis, new_figure, style, to_svg

COLORS = {"ddp": "#D55E00", "diloco": "#0072B2", "fomoe": "#009E73"}


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    packed = run / f"{name}.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else (
        run / f"{name}.jsonl"
    ).read_text()  # fmt: skip
    return [json.loads(line) for line in text.splitlines()]


def main(folder: Path, output: Path) -> None:
    with style():
        figure, (by_tokens, by_bytes) = new_figure(2, columns=2, width=8, height=3.2)
        for strategy, color in COLORS.items():
            lines = lines_of(folder / strategy, "metrics")
            evaluations = {e["round"]: e["loss"] for e in lines if e["kind"] == "evaluation"}
            rounds = {r["round"]: r for r in lines if r["kind"] == "round"}
            losses = list(evaluations.values())
            exchanged = ("shared", "router", "expert", "tokens")
            sent = [
                sum(sum(rounds[i]["bytes"][c] for c in exchanged) for i in range(index + 1)) / 4
                for index in evaluations
            ]
            tokens = [rounds[index]["tokens"] / 1e6 for index in evaluations]
            look = {"color": color, "marker": "o", "markersize": 3, "label": strategy}
            by_tokens.plot(tokens, losses, **look)
            by_bytes.plot(sent, losses, **look)
        by_tokens.set_xlabel("tokens of all sites, millions")
        by_tokens.set_ylabel("validation loss, nats per byte")
        by_bytes.set_xlabel("bytes sent by a site")
        by_bytes.set_xscale("log")
        format_bytes_axis(by_bytes.xaxis)
        by_tokens.legend()
        figure.set_facecolor("white")
        output.write_text(to_svg(figure, "first-federation"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
