"""Sets that are more than one table: MileBench, VQA's two files, folders of pictures and of texts.

Published: github.com/MileBench/MileBench (`<Task>/<Task>.json` with `meta_data` and `data`,
`<Task>/images`), visualqa.org/download.html (`questions`, `annotations`), textvqa.org/dataset and
rrc.cvc.uab.es (`data`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import images
from hkvprof.samples.layouts.drafts import (
    Draft,
    Row,
    RowLayout,
    interleave,
    needed,
    text,
    text_part,
)
from hkvprof.samples.layouts.pictures import Part, Pictures, listed, wrong
from hkvprof.samples.layouts.tables import ListTable, read_json, read_text
from hkvprof.samples.videos import natural

MAX_FILES = 100_000
_REPLIES = ("multiple_choice_answer", "answers")
PIECE = 8_000
"""Most characters of a piece of text: some 2,000 tokens of English."""
_MARK = re.compile(r"\{(?:image|table)#([0-9]{1,6})\}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def files_below(folder: Path, suffixes: tuple[str, ...], depth: int = 1) -> list[Path]:
    """The files with one of the suffixes in a folder and, for a greater depth, in folders below it,
    hidden ones left out, sorted. Raises UsageError for too many."""
    found: list[Path] = []
    level = [folder]
    for _ in range(depth):
        entries = [entry for place in level for entry in _entries(place)]
        found += [e for e in entries if e.suffix.lower() in suffixes and e.is_file()]
        if len(found) > MAX_FILES:
            raise UsageError(f"{folder} holds more than {MAX_FILES:,} files: take a part of them")
        level = [e for e in entries if e.is_dir() and not e.is_symlink()]
    return sorted(found)


def own_files(folder: Path, suffixes: tuple[str, ...], depth: int = 1) -> list[Path]:
    """As `files_below`, for files whose text errors quote. Raises SampleError for one that is a
    link out of the folder."""
    files = files_below(folder, suffixes, depth)
    for path in files:
        images.inside(folder, path)
    return files


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}") from None


def files_table(folder: Path, files: list[Path], column: str) -> ListTable:
    """One row per picture or video, in the column that holds it, called by its path below the
    folder."""
    names = [path.relative_to(folder).as_posix() for path in files]
    return ListTable(folder.name, [{"id": name, column: name} for name in names],
                     [str(path) for path in files])  # fmt: skip


def videos_table(folder: Path, files: list[Path]) -> ListTable:
    """One row per video file, and per folder inside the folder whose pictures are frames, unless
    video files lie in it."""
    held = {part for path in files for part in path.relative_to(folder).parts[:-1]}
    inside = {e for e in _entries(folder) if e.is_dir() and e.name not in held}
    both = sorted((*files, *inside), key=lambda path: natural(path.relative_to(folder).as_posix()))
    return files_table(folder, both, "video")


def text_table(folder: Path, files: list[Path]) -> ListTable:
    """One row per text; one longer than PIECE is cut into several at the ends of lines."""
    rows: list[Row] = []
    places = []
    for path in files:
        for number, piece in enumerate(pieces(read_text(path))):
            name = path.relative_to(folder).as_posix()
            rows.append({"id": f"{name}-{number:05d}", "text": piece})
            places.append(f"{path}: piece {number}")
    return ListTable(folder.name or "text", rows, places)


def pieces(content: str) -> Iterator[str]:
    """Parts of at most PIECE characters, cut at the ends of lines where there are any; together
    they are all of the text that is not blank."""
    piece = ""
    for line in content.splitlines(keepends=True):
        for start in range(0, len(line), PIECE):
            part = line[start : start + PIECE]
            if len(piece) + len(part) > PIECE:
                if piece.strip():
                    yield piece
                piece = ""
            piece += part
    if piece.strip():
        yield piece


def vqa_rows(top: Mapping[str, Any], path: Path) -> list[Row]:
    """The rows of VQA's questions, with the answers of the annotations beside them, if any."""
    subset = str(top.get("data_subtype") or "")
    answers = {str(entry.get("question_id")): entry for entry in _annotations(path, subset)}
    rows: list[Row] = []
    for question in _objects(top["questions"], "questions"):
        known = answers.get(str(question.get("question_id")), {})
        replies = {name: known[name] for name in _REPLIES if name in known}
        rows.append({**question, **_coco(question, subset), **replies})
    return rows


def _coco(question: Row, subset: str) -> Row:
    """VQA's pictures are COCO's, called by the number of the image."""
    number = question.get("image_id")
    if "image" in question or type(number) is not int:
        return {}
    return {"image": f"COCO_{subset}_{number:012d}.jpg" if subset else f"{number:012d}.jpg"}


def _annotations(path: Path, subset: str) -> list[Row]:
    """The `annotations` of the file beside `path` that is called like it."""
    for other in own_files(path.parent, (".json",)):
        if "annotation" in other.name.lower() and (not subset or subset in other.name):
            return _objects(needed(_top(other), "annotations")[1], "annotations")
    return []


def _top(path: Path) -> Row:
    top = read_json(path)
    if not isinstance(top, Mapping):
        raise SampleError(f"{path}: expected an object")
    return top


def _objects(value: object, field: str) -> list[Row]:
    if not isinstance(value, list):
        raise wrong(field, "a list of objects", value)
    return [entry for entry in value if isinstance(entry, Mapping)]


def textvqa_rows(rows: list[Any]) -> list[Any]:
    """TextVQA's rows, each with the name of its picture."""
    return [
        {**row, "image": f"{row['image_id']}.jpg"}
        if isinstance(row, Mapping) and "image_id" in row and "image" not in row
        else row
        for row in rows
    ]


def milebench_files(folder: Path) -> list[Path]:
    """`<Task>.json` of every task in the folder, or of the one task that the folder is."""
    own = folder / f"{folder.name}.json"
    if own.is_file():
        images.inside(folder, own)
    files = [own] if own.is_file() else own_files(folder, (".json",), depth=2)
    return [file for file in files if file.stem == file.parent.name and _is_milebench(file)]


def _is_milebench(path: Path) -> bool:
    """By the folder of its pictures, so that no large file is read for it."""
    return (path.parent / "images").is_dir()


def milebench_table(folder: Path, files: list[Path]) -> ListTable:
    """The questions of all tasks; a row says where its pictures are, below the folder."""
    rows: list[Row] = []
    places = []
    for file in files:
        top, task = _top(file), file.stem
        below = file.parent.relative_to(folder).as_posix()
        for number, row in enumerate(_objects(needed(top, "data")[1], "data")):
            own = {"task": task, "id": f"{task}-{row.get('sample_id')}"}
            around = {"meta_data": top.get("meta_data"), "images": f"{below}/images"}
            rows.append({**row, **around, **own})
            places.append(f"{file}: data[{number}]")
    return ListTable(folder.name, rows, places)


def _milebench(row: Row, pictures: Pictures) -> Draft:
    """The context with a picture in the place of every `{image#n}`; pictures that it does not name
    come first, and a number without a picture stays as written, as in MileBench's own code."""
    instance = needed(row, "task_instance")[1]
    if not isinstance(instance, Mapping):
        raise wrong("task_instance", "an object", instance)
    options = _options(instance.get("choice_list") or [])
    below = text(needed(row, "images")[1], "images")
    context = text(instance.get("context"), "task_instance.context") + _listed(options)
    given = listed(instance.get("images_path") or [], "task_instance.images_path")
    shown = [pictures.part(f"{below}/{text(value, field)}", field) for field, value in given]
    named = {int(number) for number in _MARK.findall(context)}

    def picture(match: re.Match[str]) -> Part:
        number = int(match[1])
        return shown[number - 1] if 0 < number <= len(shown) else text_part(match[0])

    first = [part for number, part in enumerate(shown, start=1) if number not in named]
    parts = [text_part(f"{_instruction(row)}\n"), *first, *interleave(context, _MARK, picture)]
    return {"messages": [{"role": "user", "content": parts}], "reply": _answer(row, options)}


def _options(value: object) -> list[str]:
    if not isinstance(value, list):
        raise wrong("task_instance.choice_list", "a list of texts", value)
    return [text(option, f"task_instance.choice_list[{i}]") for i, option in enumerate(value)]


def _instruction(row: Row) -> str:
    meta = needed(row, "meta_data")[1]
    texts = meta.get("task_instruction") if isinstance(meta, Mapping) else None
    number = needed(row, "task_instruction_id")[1]
    if not isinstance(texts, list) or type(number) is not int or not 0 <= number < len(texts):
        raise wrong(
            "task_instruction_id", "the number of a text in meta_data.task_instruction", number
        )
    return text(texts[number], "meta_data.task_instruction")


def _listed(options: list[str]) -> str:
    """Options below the context: lettered, unless there are more of them than letters."""
    if not options:
        return ""
    lettered = len(options) <= len(_LETTERS)
    lines = [f"{_LETTERS[i]}. {o}" if lettered else o for i, o in enumerate(options)]
    return "\n".join(["", "Choice list:", *lines, "Your answer is:"])


def _answer(row: Row, options: list[str]) -> str:
    """The response, or the letter of the option that it is."""
    response = text(needed(row, "response")[1], "response")
    folded = [option.strip().lower() for option in options]
    if response.strip().lower() in folded and len(options) <= len(_LETTERS):
        return _LETTERS[folded.index(response.strip().lower())]
    return response


MILEBENCH = RowLayout(
    name="milebench",
    title="MileBench",
    source="https://github.com/MileBench/MileBench",
    fits=lambda columns: {"task_instance", "response"} <= columns,
    build=_milebench,
    fields=(
        ("task_instance", "question, with pictures in the places of {image#n}, and options"),
        ("response", "reply, as the letter of its option"),
    ),
)
