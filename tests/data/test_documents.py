# SPDX-License-Identifier: Apache-2.0
"""Documents of every format: what they are, and what is refused with its place."""

import gzip
import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from document_files import WRITERS, numbered, opened, write_jsonl
from pyarrow import parquet

from fomoe.data.documents import TEXT_PIECE
from fomoe.errors import UserError


def documents_of(path: Path, start: int = 0, **source: str) -> list[str | None]:
    documents = opened(path, **source)
    return [
        documents.text(0, start + row, content)
        for row, content in enumerate(documents.rows(0, start))
    ]


@pytest.mark.parametrize("format", WRITERS)
def test_a_file_gives_its_documents_in_order_and_from_any_row(tmp_path: Path, format: str):
    file = WRITERS[format](tmp_path / f"some [files] *.{format}", numbered(20))
    assert documents_of(file) == numbered(20)
    assert documents_of(file, start=13) == numbered(20)[13:]
    assert documents_of(file, start=20) == []


def test_a_json_line_may_hold_any_character_and_other_fields_any_type(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    lines = [
        {"meta": None, "body": "line\u2028separator \r\n and \U0001f600"},
        {"body": "b", "meta": {"deep": [1]}},
        {"meta": "text", "body": ""},
    ]
    written = [json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_bytes(("\ufeff" + "\r\n".join([*written, "", "  "])).encode())
    assert documents_of(file, field="body") == [*(line["body"] for line in lines), None, None]


def test_json_lines_may_be_compressed(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert documents_of(tmp_path / "a.jsonl.gz") == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ('{"text": "a"', "is not valid JSON: Expecting"),
        ("[" * 100_000, "is not valid JSON: "),
        ('["a"]', "expected a JSON object, got an array"),
        ('"a"', "expected a JSON object, got a string"),
        ('{"body": "a", "id": 7}', "has no field 'text'; its fields: 'body', 'id'"),
        ('{"text": null}', "field 'text' is null, expected a string"),
        ('{"text": 7}', "field 'text' is the number 7, expected a string"),
        ('{"text": "\\ud800"}', r"field 'text' holds half a character, U\+D800"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path: Path, line: str, mistake: str):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"data.sources\[0\]: .*a\.jsonl line 3:? {mistake}"):
        documents_of(file)


def test_a_wrong_first_line_is_found_by_the_check(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\n{"body": "x"}\n')
    with pytest.raises(UserError, match="line 2 has no field 'text'"):
        opened(tmp_path / "a.jsonl")


def test_lines_that_are_not_utf8_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: .*0xe9"):
        documents_of(tmp_path / "a.jsonl")


def test_a_damaged_compressed_file_is_refused(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", numbered(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(file.read_bytes())[:-50])
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl\.gz: "):
        documents_of(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("columns", "mistake"),
    [
        ({"body": ["a"]}, "has no column 'text'; its columns: 'body'"),
        ({"text": [7]}, "column 'text' of .* has type int64, expected string"),
        ({"text": ["a", "b", None]}, "row 2: field 'text' is null, expected a string"),
    ],
)
def test_a_wrong_parquet_column_is_named(tmp_path: Path, columns: dict, mistake: str):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"data.sources\[0\]: .*{mistake}"):
        documents_of(tmp_path / "a.parquet")


def test_what_is_no_parquet_file_or_half_of_one_is_refused(tmp_path: Path):
    file = WRITERS["parquet"](tmp_path / "a.parquet", numbered(100))
    for content in (file.read_bytes()[:900], b"text"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*a\.parquet as parquet: Parquet \w+"):
            opened(file)


def test_parquet_of_a_damaged_middle_is_refused_when_it_is_read(tmp_path: Path):
    file = WRITERS["parquet"](tmp_path / "a.parquet", ["text " * 50] * 500)
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: "):
        documents_of(file)


def test_a_text_is_cut_into_pieces_at_line_ends(tmp_path: Path):
    text = "".join(f"line {i} \u00e4\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    pieces = documents_of(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert len(pieces) == -(-len(text.encode()) // TEXT_PIECE)
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(abs(len(piece.encode()) - TEXT_PIECE) < 40 for piece in pieces[:-1])
    for start in range(len(pieces) + 1):
        assert documents_of(tmp_path / "a.txt", start) == pieces[start:]


@pytest.mark.parametrize("length", [1, TEXT_PIECE - 1, TEXT_PIECE, TEXT_PIECE + 1, 200_001])
def test_a_text_without_line_ends_is_cut_between_characters(tmp_path: Path, length: int):
    text = ("a" + "\U0001f600" * length).encode()[:length].decode(errors="ignore")
    (tmp_path / "a.txt").write_text(text)
    pieces = documents_of(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert all(pieces)


def test_text_that_is_not_utf8_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 0xe9 near offset 3"):
        opened(tmp_path / "a.txt")


@pytest.mark.parametrize("format", WRITERS)
def test_a_file_is_not_held_as_a_whole(tmp_path: Path, format: str):
    file = tmp_path / f"a.{format}"
    if format == "jsonl":
        write_jsonl(file, ["many words " * 1000] * 3000)
    else:
        words = [f"{i} " * 2000 for i in range(3000)]
        table = pyarrow.table({"text": words})
        parquet.write_table(table, file, use_dictionary=False, compression="none")
        del table
    documents = opened(file)
    tracemalloc.start()
    rows = documents.rows(0, 0)
    next(rows)
    python, arrow = tracemalloc.get_traced_memory()[1], pyarrow.total_allocated_bytes()
    tracemalloc.stop()
    assert python + arrow < 15_000_000  # of 33 and 29 MB


@pytest.mark.parametrize("format", WRITERS)
def test_a_missing_library_is_named_and_text_needs_none(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = WRITERS[format](tmp_path / f"a.{format}", ["x"])
    with pytest.raises(UserError, match=rf"as {format} needs datasets, .*'fomoe\[hf\]'"):
        opened(file)
    (tmp_path / "a.txt").write_text("x")
    assert documents_of(tmp_path / "a.txt") == ["x"]
