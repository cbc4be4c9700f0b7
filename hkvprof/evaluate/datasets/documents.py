"""Layouts of questions on single images: scanned pages (DocVQA) and text in images (OCRBench)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

from hkvprof.evaluate.datasets.records import Record, as_record, as_records, read_json
from hkvprof.evaluate.datasets.source import (
    DatasetQuestion,
    Layout,
    ListedQuestion,
    Source,
    image_part,
    text_part,
)
from hkvprof.evaluate.metrics import ANLS, FORMULA, SUBSTRING
from hkvprof.evaluate.records import Gold

# DocVQA (single page, task 1): questions on scanned pages, several accepted answers.
#
#     <root>/val_v1.0_withQT.json    {"data": [{"questionId", "question", "image", "answers", ...}]}
#     <root>/documents/<page>.png    `image` reads "documents/<page>.png"
#
# Layout: rrc.cvc.uab.es/?ch=17&com=downloads, where the files now come as spdocvqa_qas/ and
# spdocvqa_images/ (pages without the folder documents/); both are found, and val/ as well. The test
# split has no answers. A sub-task is the first of `question_types`.

DOCVQA_FILES = tuple(
    f"{folder}{name}"
    for folder in ("", "val/", "spdocvqa_qas/", "qas/")
    for name in ("val_v1.0_withQT.json", "val_v1.0.json")
)
DOCVQA_IMAGE_FOLDERS = ("", "val")
DOCVQA_PAGE_FOLDERS = ("spdocvqa_images", "images")
"""Where pages lie without the folder that `image` names."""
DOCVQA_PROMPT = "Answer the question using a single word or phrase."


def _docvqa_entries(source: Source) -> Iterator[ListedQuestion]:
    file = source.find(*DOCVQA_FILES)
    for row in as_record(file, read_json(source.root, file)).records("data"):
        task = row.texts("question_types")[0] if row.fields.get("question_types") else "docvqa"
        yield ListedQuestion(task, row.label("questionId"), partial(_docvqa_question, source, row))


def _docvqa_question(source: Source, row: Record) -> DatasetQuestion:
    written, where = row.text("image"), f"{row.where}: field 'image'"
    page = PurePosixPath(written)
    plain = page.parts[:-1] == ("documents",)
    pages = tuple(f"{folder}/{page.name}" for folder in DOCVQA_PAGE_FOLDERS if plain)
    image = image_part(source.root, DOCVQA_IMAGE_FOLDERS, written, where, pages)
    question = text_part(f"{row.text('question')}\n{DOCVQA_PROMPT}")
    return DatasetQuestion([image, question], Gold(row.texts("answers"), ANLS))


DOCVQA_LAYOUT = Layout(_docvqa_entries, max_new_tokens=64)


# OCRBench: 1,000 questions on text in images, ten kinds.
#
#     <root>/OCRBench.json      [{"dataset_name", "image_path", "question", "answers", "type"}]
#     <root>/OCRBench_Images/<image_path>
#
# Layout and scoring: github.com/Yuliang-Liu/MultimodalOCR, OCRBench/json_files/OCRBench.json and
# OCRBench/example.py: an answer is right that contains a reference; formulas (HME100k) without
# white space and with case. `answers` is a text or a list. Ids are the positions in the file.

OCRBENCH_FILES = ("OCRBench.json", "OCRBench/OCRBench.json", "json_files/OCRBench.json")
OCRBENCH_IMAGE_FOLDERS = ("OCRBench_Images", "images", "")


def _ocrbench_entries(source: Source) -> Iterator[ListedQuestion]:
    file = source.find(*OCRBENCH_FILES)
    for number, row in enumerate(as_records(str(file), read_json(source.root, file))):
        yield ListedQuestion(
            row.label("type"), f"{number:04d}", partial(_ocrbench_question, source, row)
        )


def _ocrbench_question(source: Source, row: Record) -> DatasetQuestion:
    where = f"{row.where}: field 'image_path'"
    image = image_part(source.root, OCRBENCH_IMAGE_FOLDERS, row.text("image_path"), where)
    plain = isinstance(row.get("answers"), str)
    answers = (row.text("answers"),) if plain else row.texts("answers")
    metric = FORMULA if row.label("dataset_name") == "HME100k" else SUBSTRING
    return DatasetQuestion([image, text_part(row.text("question"))], Gold(answers, metric))


OCRBENCH_LAYOUT = Layout(_ocrbench_entries, max_new_tokens=128)
