"""OCRBench: 1,000 questions on text in images, ten kinds.

    <root>/OCRBench.json      [{"dataset_name", "image_path", "question", "answers", "type"}]
    <root>/OCRBench_Images/<image_path>

Layout and scoring: github.com/Yuliang-Liu/MultimodalOCR, OCRBench/json_files/OCRBench.json and
OCRBench/example.py: an answer is right that contains a reference; formulas (HME100k) without white
space and with case. `answers` is a text or a list. Ids are the positions in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hkvprof.evaluate.datasets.records import Record, as_records, read_json
from hkvprof.evaluate.datasets.source import Entry, Layout, Question, Source, image_part, text_part
from hkvprof.evaluate.metrics import FORMULA, SUBSTRING
from hkvprof.evaluate.taskset import Gold

FILES = ("OCRBench.json", "OCRBench/OCRBench.json", "json_files/OCRBench.json")
IMAGE_FOLDERS = ("OCRBench_Images", "images", "")


def _entries(source: Source) -> Iterator[Entry]:
    file = source.find(*FILES)
    for number, row in enumerate(as_records(str(file), read_json(source.root, file))):
        yield Entry(row.label("type"), f"{number:04d}", partial(_question, source, row))


def _question(source: Source, row: Record) -> Question:
    where = f"{row.where}: field 'image_path'"
    image = image_part(source.root, IMAGE_FOLDERS, row.text("image_path"), where)
    plain = isinstance(row.get("answers"), str)
    answers = (row.text("answers"),) if plain else row.texts("answers")
    metric = FORMULA if row.label("dataset_name") == "HME100k" else SUBSTRING
    return Question([image, text_part(row.text("question"))], Gold(answers, metric))


LAYOUT = Layout(_entries, max_new_tokens=128)
