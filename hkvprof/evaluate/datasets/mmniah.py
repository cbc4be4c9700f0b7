"""MM-NIAH: needles in long documents of text and images.

    <root>/annotations/<task>.jsonl     retrieval-, counting- or reasoning- text or image
    <root>/images/...

`root` is a split, such as mm_niah_val. Layout, prompts and scoring: github.com/OpenGVLab/MM-NIAH
(README.md "Data Format", shells/data/mm_niah.json, utils/tools.py, calculate_scores.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial

from hkvprof.errors import UsageError
from hkvprof.evaluate.datasets.records import Record, read_lines
from hkvprof.evaluate.datasets.source import (
    DatasetQuestion,
    Layout,
    ListedQuestion,
    Part,
    Source,
    image_part,
    interleave,
    text_part,
)
from hkvprof.evaluate.metrics import LETTERS, POSITIONS, WORDS, multiple_choice
from hkvprof.evaluate.records import Gold

_MARK = re.compile("<image>")
_LETTER = "Answer with the option's letter from the given choices directly."
_PHRASE = "Answer the question using a single word or phrase."


def _entries(source: Source) -> Iterator[ListedQuestion]:
    files = source.find_all("annotations/*.jsonl")
    if not files:
        raise UsageError(f"{source.root} holds no annotations/*.jsonl (docs/tasks.md)")
    for file in files:
        for row in read_lines(source.root, file):
            name = f"{file.stem}-{row.label('id')}"
            yield ListedQuestion(file.stem, name, partial(_question, source, file.stem, row))


def _question(source: Source, task: str, row: Record) -> DatasetQuestion:
    images = iter(_images(source, row, "images_list"))
    parts = [
        part
        for text in (row.text("context"), f"\n{row.text('question')}")
        for part in interleave(text, _MARK, lambda match: _next(images, row))
    ]
    if next(images, None) is not None:
        raise row.wrong("images_list", "as many images as '<image>' in context and question")
    meta = row.record("meta")
    options, lines = _options(source, meta)
    gold = _gold(task, row, options)
    return DatasetQuestion(
        [*parts, *lines, text_part(f"\n{_LETTER if options else _PHRASE}")], gold
    )


def _next(images: Iterator[Part], row: Record) -> Part:
    part = next(images, None)
    if part is None:
        raise row.wrong("images_list", "as many images as '<image>' in context and question")
    return part


def _images(source: Source, record: Record, key: str) -> list[Part]:
    """The images of a list, below <root>/images."""
    return [
        image_part(source.root, ("images",), written, f"{record.where}: field '{key}[{i}]'")
        for i, written in enumerate(record.texts(key, at_least=0))
    ]


def _options(source: Source, meta: Record) -> tuple[tuple[str, ...], list[Part]]:
    """Texts of the options (blank where they are images), and the parts that list them."""
    key = next((k for k in ("choices", "choices_image_path") if meta.fields.get(k)), None)
    if key is None:
        return (), []
    texts = meta.texts(key, at_least=2)
    if len(texts) > len(LETTERS):
        raise meta.wrong(key, f"at most {len(LETTERS)} options")
    if key == "choices":
        return texts, [text_part(f"\n{LETTERS[i]}. {text}") for i, text in enumerate(texts)]
    images = _images(source, meta, key)
    lines = [[text_part(f"\n{LETTERS[i]}. "), image] for i, image in enumerate(images)]
    return ("",) * len(images), [part for line in lines for part in line]


def _gold(task: str, row: Record, options: tuple[str, ...]) -> Gold:
    """By the kind of the answer: an option's number, a list of counts, or text."""
    answer = row.get("answer")
    if options:
        letter = LETTERS[row.integer("answer", len(options))]
        return Gold((letter,), multiple_choice(options))
    if "counting" not in task:
        return Gold((row.text("answer"),), WORDS)
    counts = _parsed(answer) if isinstance(answer, str) else answer
    if not isinstance(counts, list) or not counts or any(type(n) is not int for n in counts):
        raise row.wrong("answer", "a list of whole numbers")
    return Gold((json.dumps(counts),), POSITIONS)


def _parsed(answer: str) -> object:
    """The value that a text holds as JSON, which some files write lists as."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None


LAYOUT = Layout(_entries, max_new_tokens=96)
