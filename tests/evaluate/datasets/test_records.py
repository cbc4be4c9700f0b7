"""Annotation files: formats, limits, and fields by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hkvprof.errors import SampleError
from hkvprof.evaluate.datasets.records import (
    Record,
    as_records,
    read_csv,
    read_json,
    read_lines,
    read_parquet,
)
from tests.evaluate.datasets.disk import write_file


def record(value: Any) -> Record:
    return Record("f.json: data[3]", {"a": value, "other": 1})


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    rows = [{"q": 'wörter, "zitiert"\nzwei', "n": "1"}, {"q": "x", "n": "2"}]
    for name in ("f.json", "f.jsonl", "f.csv", "f.parquet"):
        write_file(tmp_path / name, rows)
    json = as_records("f", read_json(tmp_path, tmp_path / "f.json"))
    lines = read_lines(tmp_path, tmp_path / "f.jsonl")
    table = read_csv(tmp_path, tmp_path / "f.csv")
    parquet = read_parquet(tmp_path, tmp_path / "f.parquet")
    for found in (json, lines, table, parquet):
        assert [dict(one.fields) for one in found] == rows
    assert json[1].where == "f[1]"
    assert lines[1].where == f"{tmp_path}/f.jsonl:2"
    assert table[1].where == f"{tmp_path}/f.csv:4"
    assert parquet[1].where == f"{tmp_path}/f.parquet: row 1"


def test_a_byte_order_mark_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert [row.fields["a"] for row in read_lines(tmp_path, path)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("f.jsonl", b'{"a": 1}\n{"a"', r"f\.jsonl:2: invalid JSON"),
        ("f.jsonl", b'{"a": 1}\n[1]', r"f\.jsonl:2: expected an object, found \[1\]"),
        ("f.csv", b"a,b\n1,2\n1,2,3\n", r"f\.csv:3: .*more cells than the header"),
        ("f.csv", b'a,b\n"1,2\n', "not a CSV file"),
        ("f.csv", b"a,b\n1," + b"x" * 200_000 + b"\n", "not a CSV file"),
        ("f.csv", b"\xff\xff", "not UTF-8 at byte 1"),
        ("f.parquet", b"PAR1 nonsense PAR1", "not a readable Parquet file"),
        ("f.parquet", b"", "not a readable Parquet file"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    read = {".jsonl": read_lines, ".csv": read_csv, ".parquet": read_parquet}[path.suffix]
    with pytest.raises(SampleError, match=says) as caught:
        read(tmp_path, path)
    assert str(path) in str(caught.value)


def test_missing_cells_are_missing_fields(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("a,b\n1\n", encoding="utf-8")
    (row,) = read_csv(tmp_path, path)
    with pytest.raises(SampleError, match="field 'b' is missing; there are: a, b"):
        row.text("b")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    for read in (read_json, read_lines, read_csv, read_parquet):
        with pytest.raises(SampleError, match="nothing"):
            read(tmp_path, tmp_path / "nothing")


def test_large_parquet_files_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "f.parquet", [{"a": "x" * 1000}] * 50)
    monkeypatch.setattr("hkvprof.evaluate.datasets.records.MAX_RECORDS", 49)
    with pytest.raises(SampleError, match="holds 50 rows of"):
        read_parquet(tmp_path, tmp_path / "f.parquet")


@pytest.mark.parametrize("value", ["", "  ", 3, None, ["x"], "\ud800", True])
def test_text_is_text(value: Any) -> None:
    assert record("x y").text("a") == "x y"
    with pytest.raises(SampleError, match=r"f\.json: data\[3\]: field 'a'"):
        record(value).text("a")


@pytest.mark.parametrize("value", ["", "a\nb", 3.0, None, [], True, "x" * 201])
def test_labels_are_short_texts_or_numbers(value: Any) -> None:
    assert (record("x").label("a"), record(-7).label("a")) == ("x", "-7")
    with pytest.raises(SampleError, match="field 'a'"):
        record(value).label("a")


@pytest.mark.parametrize("value", [-1, 5, "5", "-1", "²", 1.0, True, None, "", "9" * 5000])
def test_integers_have_bounds(value: Any) -> None:
    assert (record(4).integer("a", 5), record(" 4 ").integer("a", 5)) == (4, 4)
    with pytest.raises(SampleError, match="field 'a'"):
        record(value).integer("a", 5)


@pytest.mark.parametrize("value", [[], "x", [""], [1], {}, None, [["x"]]])
def test_lists_of_texts(value: Any) -> None:
    assert record(["x", "y"]).texts("a") == ("x", "y")
    with pytest.raises(SampleError, match=r"field 'a(\[0\])?'"):
        record(value).texts("a")


def test_objects_inside_objects_tell_where_they_are() -> None:
    inner = record({"b": [{"c": 1}]}).record("a").records("b")[0]
    with pytest.raises(SampleError) as caught:
        inner.text("c")
    said = "f.json: data[3]: a: b[0]: field 'c': expected text, found 1"
    assert str(caught.value) == said
    with pytest.raises(SampleError, match="a: expected an object, found 7"):
        record(7).record("a")
