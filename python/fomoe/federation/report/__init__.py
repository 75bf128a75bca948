# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page that compares finished runs. Needs the extra `report`."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from fomoe.errors import UserError
from fomoe.federation.report.runs import Run, read_runs
from fomoe.files import write_text

__all__ = ["Run", "read_runs", "render", "write_report"]


def write_report(runs: Sequence[str | Path], output: str | Path) -> None:
    """Writes a report of the run folders `runs` to the HTML file `output`, whole or not at all.

    Raises
    ------
    UserError
        A run folder lacks a file or a value, `output` cannot be written, or matplotlib or jinja2 is
        not installed.
    """
    page = render(read_runs([Path(run) for run in runs]))
    output = Path(output)
    try:
        write_text(output, page)
    except OSError as error:
        raise UserError(f"cannot write report {output}: {error.strerror}") from None


def render(runs: Sequence[Run]) -> str:
    """The HTML page as text; it refers to nothing outside itself."""
    jinja2, plots, routing_plots = _import_extra()
    from fomoe.federation.report import tables

    template = files("fomoe.federation.report").joinpath("template.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page: str = environment.from_string(template).render(
        rows=[tables.row(run, runs) for run in runs],
        references=tables.references(runs[0]),
        token=runs[0].summary["token"],
        facts=tables.facts(runs),
        findings=tables.findings(runs),
        warnings=tables.warnings(runs),
        figures=plots.figures(runs),
        routing=routing_plots.routing_figures(runs),
    )
    return page


def _import_extra() -> tuple[ModuleType, ModuleType, ModuleType]:
    """jinja2, and the plots that need matplotlib: only a report needs them, no training run."""
    try:
        import jinja2

        from fomoe.federation.report import plots, routing_plots
    except ModuleNotFoundError as error:
        raise UserError(
            f"a report needs {str(error.name).partition('.')[0]}, which is not installed: "
            "pip install 'fomoe[report]'"
        ) from None
    return jinja2, plots, routing_plots
