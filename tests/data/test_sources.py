# SPDX-License-Identifier: Apache-2.0
"""Sources: which files belong to one, and what identifies them."""

from pathlib import Path

import pytest

from fomoe.data.sources import Source, find_files
from fomoe.errors import UserError

MIB = 1 << 20


def found(path: Path, **source: str) -> tuple[str, list[str]]:
    files = find_files("data.sources[3]", Source(str(path), **source))
    return files.format, [file.name for file in files.files]


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")


def test_the_suffix_tells_the_format(tmp_path: Path):
    names = {"a.jsonl": "jsonl", "a.NDJSON.gz": "jsonl", "a.parquet": "parquet", "a.md": "text"}
    write(tmp_path, *names)
    assert {name: found(tmp_path / name)[0] for name in names} == names


def test_a_named_file_may_have_any_suffix_when_the_format_is_set(tmp_path: Path):
    write(tmp_path, "a.json")
    assert found(tmp_path / "a.json", format="jsonl") == ("jsonl", ["a.json"])
    with pytest.raises(UserError, match=r"data.sources\[3\]: the suffix of .*a\.json tells no"):
        found(tmp_path / "a.json")


def test_a_folder_gives_its_files_of_one_format_sorted_and_recursive(tmp_path: Path):
    write(tmp_path, "b/2.jsonl", "b/1.jsonl.gz", "c.jsonl", "a/z.jsonl", ".h.jsonl", "note.png")
    assert found(tmp_path) == ("jsonl", ["c.jsonl", "z.jsonl", "1.jsonl.gz", "2.jsonl"])


def test_a_folder_of_several_formats_needs_the_format(tmp_path: Path):
    write(tmp_path, "a.jsonl", "readme.md")
    with pytest.raises(UserError, match=r"several formats \(jsonl, text\): set format to one"):
        found(tmp_path)
    assert found(tmp_path, format="jsonl") == ("jsonl", ["a.jsonl"])
    with pytest.raises(UserError, match="holds no parquet file"):
        found(tmp_path, format="parquet")


def test_what_is_not_there_or_empty_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"data.sources\[3\]: .*a\.jsonl is empty"):
        found(tmp_path)
    with pytest.raises(UserError, match=r"data.sources\[3\]: .*gone does not exist"):
        found(tmp_path / "gone")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="holds no text, jsonl or parquet file"):
        found(tmp_path)


def test_a_field_of_a_text_is_refused(tmp_path: Path):
    write(tmp_path, "a.txt")
    with pytest.raises(UserError, match="field = 'body' has no meaning"):
        found(tmp_path / "a.txt", field="body")


def test_the_digest_sees_names_sizes_and_both_ends(tmp_path: Path):
    def digest() -> str:
        return find_files("", Source(str(tmp_path))).sha256

    big = tmp_path / "big.txt"
    content = bytearray(b"x" * (3 * MIB))
    seen = set()
    for place in (None, 0, MIB - 1, 2 * MIB, 3 * MIB - 1):
        if place is not None:
            content[place] ^= 1
        big.write_bytes(content)
        seen.add(digest())
    big.write_bytes(content + b"x")
    seen.add(digest())
    big.rename(tmp_path / "renamed.txt")
    seen.add(digest())
    (tmp_path / "more.txt").write_text("x")
    seen.add(digest())
    assert len(seen) == 8
    assert digest() in seen


def test_the_digest_does_not_depend_on_the_place_of_the_folder(tmp_path: Path):
    write(tmp_path, "one/a.txt", "two/a.txt")
    first, second = (find_files("", Source(str(tmp_path / n))).sha256 for n in ("one", "two"))
    assert first == second
