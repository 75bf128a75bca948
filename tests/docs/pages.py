# SPDX-License-Identifier: Apache-2.0
"""What the tests do with a page of docs/: find its blocks and sections, execute its snippets."""

import doctest
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line and text of every fenced block of that language."""
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        (text.count("\n", 0, match.start(2)), match[2]) for match in found if match[1] == language
    ]


def section(page: Path, title: str) -> str:
    """The text under a heading of the second level."""
    _, _, rest = page.read_text().partition(f"\n## {title}\n")
    assert rest, f"{page}: no section {title!r}"
    return rest.partition("\n## ")[0]


def run(page: Path) -> dict[str, Any]:
    """Execute the ``pycon`` blocks of a page in order and return the names they leave.

    Raises an AssertionError with the differences when something else is printed.
    """
    names: dict[str, Any] = {}
    differences: list[str] = []
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    for line, block in blocks(page, "pycon"):
        test = parser.get_doctest(block, names, page.name, str(page), line)
        runner.run(test, out=differences.append, clear_globs=False)
        names = test.globs
    assert not differences, "".join(differences)
    return names
