"""DocVQA (single page, task 1): questions on scanned pages, several accepted answers.

    <root>/val_v1.0_withQT.json     {"data": [{"questionId", "question", "image", "answers", ...}]}
    <root>/documents/<page>.png     `image` reads "documents/<page>.png"

Layout: rrc.cvc.uab.es/?ch=17&com=downloads, where the files now come as spdocvqa_qas/ and
spdocvqa_images/ (pages without the folder documents/); both are found, and val/ as well. The test
split has no answers. A sub-task is the first of `question_types`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

from hkvprof.evaluate.datasets.records import Record, as_record, read_json
from hkvprof.evaluate.datasets.source import Entry, Layout, Question, Source, image_part, text_part
from hkvprof.evaluate.metrics import ANLS
from hkvprof.evaluate.taskset import Gold

FILES = tuple(
    f"{folder}{name}"
    for folder in ("", "val/", "spdocvqa_qas/", "qas/")
    for name in ("val_v1.0_withQT.json", "val_v1.0.json")
)
IMAGE_FOLDERS = ("", "val")
PAGE_FOLDERS = ("spdocvqa_images", "images")
"""Where pages lie without the folder that `image` names."""
PROMPT = "Answer the question using a single word or phrase."


def _entries(source: Source) -> Iterator[Entry]:
    file = source.find(*FILES)
    for row in as_record(file, read_json(source.root, file)).records("data"):
        task = row.texts("question_types")[0] if row.fields.get("question_types") else "docvqa"
        yield Entry(task, row.label("questionId"), partial(_question, source, row))


def _question(source: Source, row: Record) -> Question:
    written, where = row.text("image"), f"{row.where}: field 'image'"
    page = PurePosixPath(written)
    plain = page.parts[:-1] == ("documents",)
    pages = tuple(f"{folder}/{page.name}" for folder in PAGE_FOLDERS if plain)
    image = image_part(source.root, IMAGE_FOLDERS, written, where, pages)
    question = text_part(f"{row.text('question')}\n{PROMPT}")
    return Question([image, question], Gold(row.texts("answers"), ANLS))


LAYOUT = Layout(_entries, max_new_tokens=64)
