"""A question, perhaps with pictures, and its answer: tables of people's own, VQA, TextVQA, ChartQA,
alpaca, pictures without questions, and text.

Published: visualqa.org/download.html (questions and annotations), textvqa.org/dataset (`data`),
github.com/vis-nlp/ChartQA (`imgname`, `query`, `label`) and its rows on the hub (`image`),
github.com/tatsu-lab/stanford_alpaca (`instruction`, `input`, `output`; `system`, `history` and
`images` as in LLaMA-Factory's data/README.md), huggingface.co/docs/datasets/image_load
(`file_name`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.drafts import (
    PLACE,
    Draft,
    Row,
    RowLayout,
    needed,
    text,
    text_part,
    with_places,
)
from hkvprof.samples.layouts.media import Media
from hkvprof.samples.layouts.pictures import Pictures, wrong

QUESTIONS = ("question", "query", "prompt")
ANSWERS = (
    "reply", "answer", "multiple_choice_answer", "answers", "label", "response", "completion",
    "output",
)  # fmt: skip
IMAGES = ("image", "images", "image_path", "img_path", "imgname", "file_name", "image_paths")
CAPTIONS = ("caption", "captions", "text")
ALL = "question for all"
"""The column in which --question arrives; nobody else's can have this name by chance."""


def _media(row: Row, pictures: Pictures) -> Media:
    """What the row shows, whatever its columns are called. Raises SampleError for too much."""
    return Media.of({name: _unpacked(value) for name, value in row.items()}, pictures, IMAGES)


def _unpacked(value: object) -> object:
    """A list that a cell of a CSV file holds as JSON; anything else as it is."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def asked(question: str, field: str, row: Row, pictures: Pictures) -> Draft:
    """The draft of one question: pictures in the places of `<image>` or, where the question has
    none, before it."""
    media = _media(row, pictures)
    if PLACE.search(question):
        return with_places([("user", question)], media, field)
    if not media.count:
        return {"messages": [{"role": "user", "content": question}]}
    return {"messages": [{"role": "user", "content": [*media.all(), text_part(question)]}]}


def reply_of(row: Row, names: tuple[str, ...] = ANSWERS) -> str | None:
    """The answer in the first of the columns that holds one: of a list the commonest, of equally
    common ones the first. None where there is none. Raises SampleError."""
    for name in names:
        if row.get(name) not in (None, "", []):
            return _answer(_unpacked(row[name]), name)
    return None


def _answer(value: object, field: str) -> str:
    if isinstance(value, Mapping):
        key = next((k for k in ("answer", "text", "value") if value.get(k) is not None), None)
        if key is None:
            raise wrong(field, "a text, or an object with 'answer'", dict(value))
        return _answer(value[key], f"{field}.{key}")
    if isinstance(value, list):
        answers = [_answer(entry, f"{field}[{i}]") for i, entry in enumerate(value)]
        return Counter(answers).most_common(1)[0][0] if answers else ""
    return text(value, field)


def _question(row: Row, pictures: Pictures) -> Draft:
    field, question = needed(row, *QUESTIONS)
    draft = asked(text(question, field), field, row, pictures)
    return {**draft, "reply": reply_of(row)}


def _alpaca(row: Row, pictures: Pictures) -> Draft:
    field, instruction = needed(row, "instruction")
    prompt = text(instruction, field)
    if row.get("input"):
        prompt = f"{prompt}\n{text(row['input'], 'input')}"
    turns = [*_history(row.get("history")), ("user", prompt)]
    if row.get("system"):
        turns.insert(0, ("system", text(row["system"], "system")))
    draft = with_places(turns, _media(row, pictures), field)
    return {**draft, "reply": reply_of(row, ("output", "response"))}


def _history(pairs: object) -> list[tuple[str, str]]:
    """Earlier turns, as pairs of question and answer."""
    turns: list[tuple[str, str]] = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong(f"history[{number}]", "a question and its answer", pair)
        turns += [("user", text(pair[0], f"history[{number}][0]")),
                  ("assistant", text(pair[1], f"history[{number}][1]"))]  # fmt: skip
    return turns


def _captioned(row: Row, pictures: Pictures) -> Draft:
    if not row.get(ALL):
        raise SampleError(
            "pictures and videos without questions: give one for all with --question, such as "
            "--question 'What does this show?'"
        )
    draft = asked(text(row[ALL], "question"), "question", row, pictures)
    return {**draft, "reply": reply_of(row, CAPTIONS)}


def _plain(row: Row, pictures: Pictures) -> Draft:
    """A text, then the question for all, if there is one."""
    field, content = needed(row, "text", "content")
    parts = [text_part(text(content, field))]
    if row.get(ALL):
        parts.append(text_part(row[ALL]))
    return {"messages": [{"role": "user", "content": parts}], "reply": None}


def _has(columns: frozenset[str], *names: str) -> bool:
    return any(name in columns for name in names)


_PICTURE_FIELDS = tuple((name, "pictures before the question") for name in IMAGES)
_ANSWER_FIELDS = tuple((name, "reply; of several the commonest") for name in ANSWERS)

QUESTION = RowLayout(
    name="questions",
    title="questions and answers (VQA, TextVQA, DocVQA and tables of one's own)",
    source="https://visualqa.org/download.html",
    fits=lambda columns: _has(columns, *QUESTIONS),
    build=_question,
    fields=(*((name, "question") for name in QUESTIONS), *_PICTURE_FIELDS, *_ANSWER_FIELDS),
)
CHARTQA = RowLayout(
    name="chartqa",
    title="ChartQA",
    source="https://github.com/vis-nlp/ChartQA",
    fits=lambda columns: {"query", "label"} <= columns and _has(columns, "imgname", "image"),
    build=_question,
    fields=(("query", "question"), *_PICTURE_FIELDS, ("label", "reply")),
)
ALPACA = RowLayout(
    name="alpaca",
    title="instructions (alpaca)",
    source="https://github.com/tatsu-lab/stanford_alpaca#data-release",
    fits=lambda columns: {"instruction", "output"} <= columns,
    build=_alpaca,
    fields=(
        ("instruction", "question"),
        ("input", "question, on a line after the instruction"),
        ("output", "reply"),
        ("system", "first message"),
        ("history", "earlier messages"),
        ("images", "pictures in the places of <image>"),
    ),
)
VIDEOS = RowLayout(
    name="videos",
    title="video files or folders of frames, with one question for all",
    source="https://huggingface.co/docs/datasets/video_load",
    fits=lambda columns: _has(columns, "video", "videos"),
    build=_captioned,
    fields=((ALL, "question"), ("video", "video before the question")),
)
PICTURES = RowLayout(
    name="pictures",
    title="pictures, with one question for all",
    source="https://huggingface.co/docs/datasets/image_load",
    fits=lambda columns: _has(columns, *IMAGES),
    build=_captioned,
    fields=(
        (ALL, "question"),
        *_PICTURE_FIELDS,
        *((name, "reply") for name in CAPTIONS),
    ),
)
TEXT = RowLayout(
    name="text",
    title="plain text, one sample a piece",
    source="https://huggingface.co/docs/datasets/nlp_load",
    fits=lambda columns: _has(columns, "text", "content"),
    build=_plain,
    fields=(("text", "text"), ("content", "text"), (ALL, "question after the text")),
)
