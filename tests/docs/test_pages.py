# SPDX-License-Identifier: Apache-2.0
"""The pages of the ops and of the layer say what the code says, and their snippets run.

A page that fails here is out of date, or the docstring it is compared with is: change either by
hand. They quote signatures, schemas, argument types and defaults word by word.
"""

import ast
import dataclasses
import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from pages import DOCS, ROOT, blocks, run, section

from fomoe import MoEConfig, ops
from fomoe.ops import _names
from fomoe.ops._checks import FLOATS

INDEX, LAYER, DATA = DOCS / "ops" / "README.md", DOCS / "layer.md", DOCS / "data.md"
HUGGING_FACE = DOCS / "huggingface.md"
OPS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
PAGES = {name: DOCS / "ops" / f"{name}.md" for name in OPS}
SECTIONS = (
    *("Computes", "Arguments", "Returns", "Gradients", "Edge cases"),
    *("Determinism", "Memory", "Raises", "Example", "Source"),
)


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [INDEX, *PAGES.values(), LAYER, DATA, HUGGING_FACE], ids=name_of)
def test_snippets_print_what_the_page_says(page):
    assert run(page)


def test_a_snippet_that_prints_something_else_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> 1 + 1\n2\n```\n\n```pycon\n>>> 2 + 2\n5\n```\n")
    with pytest.raises(AssertionError, match=r"line 7(.|\n)*Expected:\n    5\nGot:\n    4"):
        run(page)


def rows_of(table: str) -> list[list[str]]:
    """Cells of the rows of all tables in a text, without headings and rules."""
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_op_is_in_the_index_and_has_a_page_with_every_section():
    assert sorted(path.stem for path in (DOCS / "ops").glob("[a-z]*.md")) == OPS
    linked = re.findall(r"^\| \[`(\w+)`\]\(\1\.md\) \|", INDEX.read_text(), re.MULTILINE)
    assert sorted(linked) == OPS
    for page in PAGES.values():
        assert tuple(re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)) == SECTIONS


def signature_of(source: str) -> str:
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert function.returns is not None
    return f"{function.name}({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"


@pytest.mark.parametrize("op", OPS)
def test_the_signature_is_that_of_the_function(op):
    [(_, block)] = blocks(PAGES[op], "python")
    assert signature_of(block) == signature_of(inspect.getsource(getattr(ops, op)))


@pytest.mark.parametrize("op", OPS)
def test_types_of_arguments_and_result_are_those_of_the_docstring(op):
    docstring = inspect.getdoc(getattr(ops, op)).replace("``", "")
    parameters, _, returns = docstring.partition("\nParameters\n----------\n")[2].partition(
        "\n\nReturns\n-------\n"
    )
    documented = re.findall(r"^(\w+) : (.+)$", parameters, re.MULTILINE)
    arguments = section(PAGES[op], "Arguments")
    assert re.findall(r"^- `(\w+)`: `([^`]+)`", arguments, re.MULTILINE) == documented
    result = re.search(r"`([^`]+)`", section(PAGES[op], "Returns"))
    assert result is not None
    assert result[1] == returns.splitlines()[0]
    if op not in ("route", "destinations"):
        assert " | ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS) in documented[0][1]


@pytest.mark.parametrize(("op", "result"), [("topk_gate", ops.GateOutput), ("route", ops.Routing)])
def test_fields_of_a_result_are_those_of_the_named_tuple(op, result):
    names = [row[0].strip("`") for row in rows_of(section(PAGES[op], "Returns"))]
    assert tuple(names) == result._fields


def test_schemas_are_those_that_are_registered():
    names = torch._C._dispatch_get_all_op_names()
    ours = [name.removeprefix("fomoe::") for name in names if name.startswith("fomoe::")]
    registered = [str(getattr(torch.ops.fomoe, name).default._schema) for name in ours]
    [(_, block)] = blocks(INDEX, "")[-1:]
    on_the_page = [" ".join(schema.split()) for schema in re.split(r"\n(?=\w)", block)]
    assert sorted(f"fomoe::{schema}" for schema in on_the_page) == sorted(registered)


def test_codes_are_those_of_the_wrappers():
    codes = {
        "score": _names.GATE_SCORES,
        "group_score": _names.GROUP_SCORES,
        "activation": _names.ACTIVATIONS,
    }
    expected = [
        [f"`{argument}`", ", ".join(f"{code} {name}" for name, code in of_argument.items())]
        for argument, of_argument in codes.items()
    ]
    assert rows_of(section(INDEX, "Schemas")) == expected


def test_settings_of_the_layer_are_the_fields_of_its_config():
    rows = rows_of(section(LAYER, "Settings"))
    fields = dataclasses.fields(MoEConfig)
    expected = [
        [f"`{field.name}`", "-" if field.default is dataclasses.MISSING else f"`{field.default!r}`"]
        for field in fields
    ]
    assert [row[:2] for row in rows] == expected
    types = typing.get_type_hints(MoEConfig)
    for field, row in zip(fields, rows, strict=True):
        for choice in typing.get_args(types[field.name]):
            assert (
                typing.get_origin(types[field.name]) is not typing.Literal or repr(choice) in row[2]
            )


def anchors_of(page: Path) -> set[str]:
    """The fragments by which a page's headings can be linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.rglob("*.md")], ids=lambda p: p.stem)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target, fragment in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors_of(linked), fragment
    for path in re.findall(r"`((?:csrc|python|examples|docs|tests|tools)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
