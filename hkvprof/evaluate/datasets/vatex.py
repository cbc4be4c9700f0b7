"""VATEX: one caption of a short video against ten written by people.

    <root>/vatex_validation_v1.0.json     [{"videoID": ..., "enCap": [...]}, ...]
    <root>/frames/<videoID>/              frames in order

Layout: eric-xw.github.io/vatex-website (download.html); fields as lmms-eval's task `vatex_test`
reads them. Of several annotation files the public test split is taken, then validation; English
captions alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hkvprof.evaluate.datasets.frames import frame_parts
from hkvprof.evaluate.datasets.records import Record, as_records, read_json
from hkvprof.evaluate.datasets.source import Entry, Layout, Question, Source, text_part
from hkvprof.evaluate.metrics import ROUGE_L
from hkvprof.evaluate.taskset import Gold

FILES = tuple(
    f"{folder}{name}"
    for name in ("vatex_public_test_english_v1.1.json", "vatex_validation_v1.0.json")
    for folder in ("", "annotations/")
)
PROMPT = "Describe what happens in the video in one sentence."


def _entries(source: Source) -> Iterator[Entry]:
    file = source.find(*FILES)
    for row in as_records(str(file), read_json(source.root, file)):
        yield Entry("captioning", row.label("videoID"), partial(_question, source, row))


def _question(source: Source, row: Record) -> Question:
    frames = frame_parts(source, row.label("videoID"), f"{row.where}: field 'videoID'")
    return Question([*frames, text_part(PROMPT)], Gold(row.texts("enCap"), ROUGE_L))


LAYOUT = Layout(_entries, max_new_tokens=64)
