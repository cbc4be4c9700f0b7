"""From a file or folder to a table in a layout; None where it is hkvprof's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.lazy import require_extra
from hkvprof.samples.layouts import folders, tables
from hkvprof.samples.layouts.folders import MILEBENCH, files_below, own_files
from hkvprof.samples.layouts.opened import NATIVE, Opened
from hkvprof.samples.layouts.parquet import ParquetTable
from hkvprof.samples.layouts.questions import PICTURES, TEXT, VIDEOS
from hkvprof.samples.layouts.recognise import (
    Reading,
    is_native,
    one_split,
    opened,
    recognise,
)
from hkvprof.samples.videos import PICTURE_SUFFIXES, VIDEO_SUFFIXES, is_video

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is looked at to recognise a .jsonl file: pictures in it may be base64."""
_FILES = (".jsonl", ".json", ".csv", ".tsv")
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_DEPTH = 4
"""Levels of folders in which Parquet files and pictures are looked for."""
_WHAT = "JSON, CSV or Parquet files, pictures, videos or .txt files"


def open_file(path: Path, reading: Reading) -> Opened | None:
    """A file in the layout that is wanted or recognised; None for lines of samples.jsonl.

    Raises SampleError, UsageError.
    """
    kind = path.suffix.lower()
    if reading.layout == NATIVE:
        return None
    if kind == ".parquet":
        return opened(ParquetTable(path.stem, [path]), reading, path.parent)
    if kind in (".csv", ".tsv"):
        return opened(tables.read_csv(path), reading, path.parent)
    if kind == ".txt":
        return _texts(path.parent, [path], reading)
    if is_video(path):
        return _videos(path.parent, [path], reading)
    if kind == ".json":
        return _json(path, reading)
    if reading.layout is None and is_native(tables.first_object(path, MAX_LINE_BYTES)):
        return None
    table = tables.read_lines(path)
    return opened(_wrapped(table.name, table.rows, table.places), reading, path.parent)


def open_folder(folder: Path, reading: Reading) -> Opened:
    """What a folder without samples.jsonl holds. Raises SampleError; UsageError where it holds
    nothing that is taken, or too much to know what is meant."""
    wanted = reading.layout
    if wanted in (None, MILEBENCH.name) and (files := folders.milebench_files(folder)):
        return opened(folders.milebench_table(folder, files), reading, folder)
    if wanted == VIDEOS.name:
        files = files_below(folder, VIDEO_SUFFIXES, _DEPTH)
        return opened(folders.videos_table(folder, files), reading, folder)
    if wanted not in (PICTURES.name, TEXT.name) and (file := _data_file(folder)) is not None:
        if (found := open_file(file, reading)) is not None:
            return found
        raise UsageError(f"{_lacks(folder)}; give {file} itself")
    if files := own_files(folder, (".parquet",), _DEPTH):
        kept, notes = one_split(files)
        return opened(ParquetTable(folder.name, kept), reading, folder, notes=notes)
    if wanted != TEXT.name and (files := files_below(folder, PICTURE_SUFFIXES, _DEPTH)):
        return _pictures(folder, files, reading)
    if files := own_files(folder, (".txt",), _DEPTH):
        return _texts(folder, files, reading)
    if files := files_below(folder, VIDEO_SUFFIXES, _DEPTH):
        return _videos(folder, files, reading)
    raise UsageError(f"{_lacks(folder)}, and no {_WHAT} (docs/sample-format.md)")


def _lacks(folder: Path) -> str:
    return f"the folder {folder} holds no samples.jsonl"


def _data_file(folder: Path) -> Path | None:
    """The one file of data in a folder, if any; annotations and descriptions do not count."""
    files = [
        path
        for path in own_files(folder, _FILES)
        if path.name not in _ABOUT and "annotation" not in path.name.lower()
    ]
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:8])
        raise UsageError(f"the folder {folder} holds several files of data: give one ({names})")
    return files[0] if files else None


def _pictures(folder: Path, files: list[Path], reading: Reading) -> Opened:
    if reading.layout in (None, PICTURES.name) and not reading.question:
        raise UsageError(
            f"{folder} holds {len(files)} pictures without questions: give one for all with "
            "--question, such as --question 'What does this picture show?' (if they are frames, a "
            f"folder per video: --data-format {VIDEOS.name})"
        )
    return opened(folders.files_table(folder, files, "image"), reading, folder)


def _videos(folder: Path, files: list[Path], reading: Reading) -> Opened:
    """One row per video file, which is decoded by what the extra installs."""
    if reading.layout in (None, VIDEOS.name) and not reading.question:
        raise UsageError(
            f"{folder} holds {len(files)} video files without questions: give one for all with "
            "--question, such as --question 'What happens in this video?'"
        )
    require_extra("av", "video")
    return opened(folders.files_table(folder, files, "video"), reading, folder)


def _texts(folder: Path, files: list[Path], reading: Reading) -> Opened:
    note = f"text is cut at the ends of lines into pieces of at most {folders.PIECE:,} characters"
    return opened(folders.text_table(folder, files), reading, folder, notes=(note,))


def _json(path: Path, reading: Reading) -> Opened:
    """A JSON file: a list of rows, or an object that holds one."""
    top, name = tables.read_json(path), path.stem
    if isinstance(top, list):
        chat = bool(top) and all(isinstance(entry, dict) and "role" in entry for entry in top)
        return opened(_wrapped(name, [top] if chat else top), reading, path.parent)
    if not isinstance(top, Mapping):
        raise SampleError(f"{path}: expected a list of objects, found {str(top)[:60]}")
    if {"meta_data", "data"} <= set(top):
        return opened(folders.milebench_table(path.parent, [path]), reading, path.parent)
    if isinstance(top.get("questions"), list):
        return opened(_wrapped(name, folders.vqa_rows(top, path)), reading, path.parent)
    if isinstance(top.get("data"), list):
        return opened(_wrapped(name, folders.textvqa_rows(top["data"])), reading, path.parent)
    if recognise(frozenset(top)) is not None:
        return opened(_wrapped(name, [top]), reading, path.parent)
    raise SampleError(
        f"{path}: expected a list of objects, or an object with 'data' or 'questions'; found one "
        f"with {', '.join(str(key)[:40] for key in list(top)[:12])}"
    )


def _wrapped(name: str, rows: Any, places: Any = ()) -> tables.ListTable:
    """Rows of a file; a row that is a list is one of messages, as qwen-vl-utils takes them."""
    made = [{"messages": row} if isinstance(row, list) else row for row in rows]
    return tables.ListTable(name, made, places)
