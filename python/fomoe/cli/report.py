# SPDX-License-Identifier: Apache-2.0
"""`fomoe report`: one HTML page that compares runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders to compare.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write a self-contained HTML report that compares finished runs."""
    from fomoe.federation.report import write_report

    write_report(runs, output)
    typer.echo(f"wrote {output}")
