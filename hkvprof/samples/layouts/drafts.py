"""What all layouts share: a row, where its pictures go, and what becomes of its last reply."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.media import Media
from hkvprof.samples.layouts.pictures import Part, Pictures, wrong
from hkvprof.samples.parse import MAX_PARTS

Row = Mapping[str, Any]
Columns = frozenset[str]
Draft = dict[str, Any]
"""`messages`, `reply` and `followups` as samples.jsonl has them."""

PLACE = re.compile("<(image|video|audio)>")
IDS = ("id", "question_id", "questionId", "sample_id", "qid", "index")


@dataclass(frozen=True)
class RowLayout:
    """A layout whose samples are rows: of a JSON file, a table, a dataset.

    `fits` tells by the columns whether it is this one, `build` makes a row's draft, `fields` says
    what is taken from which column (a column that is not there is not mentioned), and `tasks` are
    the columns that may hold a sample's task. `source` says where the layout is published.
    """

    name: str
    title: str
    source: str
    fits: Callable[[Columns], bool]
    build: Callable[[Row, Pictures], Draft]
    fields: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...] = ("task",)


def text(value: object, field: str) -> str:
    """A string, also for a number. Raises SampleError naming the field."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise wrong(field, "text", value)
    return value


def needed(row: Row, *names: str) -> tuple[str, Any]:
    """The first of the columns `names` that holds something, and what. Raises SampleError."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    known = ", ".join(str(key)[:40] for key in list(row)[:12])
    raise SampleError(f"field '{names[0]}' is missing; there are: {known}")


def text_part(content: str) -> Part:
    """A part of a message that holds text."""
    return {"type": "text", "text": content}


def interleave(
    content: str, mark: re.Pattern[str], picture: Callable[[re.Match[str]], Part]
) -> list[Part]:
    """The text with a picture in the place of every mark; nothing but blanks is left out."""
    parts: list[Part] = []
    end = 0
    for match in mark.finditer(content):
        parts += [text_part(content[end : match.start()]), picture(match)]
        end = match.end()
    parts.append(text_part(content[end:]))
    return [part for part in parts if part["type"] != "text" or part["text"].strip()]


def with_places(turns: Sequence[tuple[str, str]], media: Media, field: str) -> Draft:
    """The draft of a conversation of (role, text), a picture in the place of every `<image>`, a
    video in that of every `<video>`.

    Raises SampleError unless there are as many places in `field` as pictures and videos.
    """
    marks = [kind for _, content in turns for kind in PLACE.findall(content)]
    _check_places(marks, media, field)
    if len(marks) * 2 + len(turns) > MAX_PARTS:
        raise wrong(field, f"at most {MAX_PARTS} pictures and texts", f"{len(marks)} places")
    return conversation(
        [{"role": role, "content": _filled(content, media)} for role, content in turns], field
    )


def _check_places(marks: list[str], media: Media, field: str) -> None:
    if "audio" in marks:
        raise SampleError(f"field '{field}': <audio> is sound, which is not read")
    for kind, given, name in (("image", media.images, "picture"), ("video", media.films, "video")):
        if marks.count(kind) != len(given):
            found = f"{marks.count(kind)} places <{kind}> and {len(given)} {name}s"
            raise wrong(field, f"one <{kind}> for every {name}", found)


def _filled(content: str, media: Media) -> str | list[Part]:
    if not PLACE.search(content):
        return content
    return interleave(content, PLACE, lambda match: media.take(match[1]))


def conversation(messages: list[dict[str, Any]], field: str) -> Draft:
    """The draft of messages: what the assistant says last becomes the reply."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return {"messages": messages}
    last = messages[-1]["content"]
    if not isinstance(last, str):
        kinds = {part["type"] for part in last}
        if kinds - {"text"}:
            raise wrong(field, "text alone in the assistant's last message", sorted(kinds))
        last = "".join(part["text"] for part in last)
    return {"messages": messages[:-1], "reply": last}
