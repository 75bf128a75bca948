# SPDX-License-Identifier: Apache-2.0
"""The command `fomoe`. One file per command; each imports what it runs only when it runs."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fomoe.errors import CommunicationError, SiteFailed, UserError

if TYPE_CHECKING:
    import typer

__all__ = ["main"]


def _app() -> "typer.Typer":
    import typer

    from fomoe.cli.bench import bench
    from fomoe.cli.build_info import build_info
    from fomoe.cli.convert import convert
    from fomoe.cli.demo import demo
    from fomoe.cli.export import export
    from fomoe.cli.generate import generate
    from fomoe.cli.report import report
    from fomoe.cli.train import train

    app = typer.Typer(
        name="fomoe",
        help="Train Mixture-of-Experts models across sites that share no fast network.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(train)
    app.command()(convert)
    app.command()(export)
    app.command()(report)
    app.command()(generate)
    app.command()(demo)
    app.command()(bench)
    app.command(name="build-info")(build_info)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the entry point of the `fomoe` script.

    Parameters
    ----------
    arguments
        What follows the program's name, None for sys.argv[1:].

    Returns
    -------
    int
        The exit code: 0, 2 for a user's mistake and 1 for a site or rank that failed (one sentence
        on stderr), 130 for Ctrl-C. An error of the program itself is raised.
    """
    try:
        _app()(args=arguments)  # loaded here, so that Ctrl-C while it loads is dealt with too
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SiteFailed, CommunicationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit_:  # the parser always ends with one
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0
