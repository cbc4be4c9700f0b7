"""Video-MME: multiple choice on short, medium and long videos, without subtitles.

    <root>/videomme/test-*.parquet     one row per question: videoID, duration, options, ...
    <root>/*.json                      one object per video with a list of questions
    <root>/frames/<video>/             frames in order; <video> is videoID or video_id

Layouts: huggingface.co/datasets/lmms-lab/Video-MME (README.md, features of config videomme) and
github.com/BradyFU/Video-MME (README.md "Dataset Content", evaluation/output_test_template.json).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hkvprof.evaluate.datasets.frames import frame_parts
from hkvprof.evaluate.datasets.records import Record, as_records, read_json, read_parquet
from hkvprof.evaluate.datasets.source import Entry, Layout, Question, Source, ask, text_part
from hkvprof.evaluate.metrics import LETTERS, multiple_choice
from hkvprof.evaluate.taskset import Gold

PARQUET = ("videomme/test-*.parquet", "test-*.parquet")
PROMPT = "Select the best answer to the following multiple-choice question based on the video."
VIDEO_FOLDERS = ("data",)


def _entries(source: Source) -> Iterator[Entry]:
    files = source.find_all(*PARQUET) or [source.find(*PARQUET, "*.json")]
    for file in files:
        if file.suffix == ".parquet":
            yield from _rows(source, file)
        else:
            yield from _videos(source, file)


def _rows(source: Source, file: Path) -> Iterator[Entry]:
    for row in read_parquet(source.root, file):
        video = "videoID" if "videoID" in row else "video_id"
        build = partial(_question, source, row, video, row, "options")
        yield Entry(row.label("duration"), row.label("question_id"), build)


def _videos(source: Source, file: Path) -> Iterator[Entry]:
    for video in as_records(str(file), read_json(source.root, file)):
        for row in video.records("questions"):
            build = partial(_question, source, video, "video_id", row, "choices")
            yield Entry(video.label("duration_category"), row.label("question_id"), build)


def _question(source: Source, video: Record, video_key: str, row: Record, key: str) -> Question:
    where = f"{video.where}: field '{video_key}'"
    frames = frame_parts(source, video.label(video_key), where, VIDEO_FOLDERS)
    options = tuple(_bare(*pair) for pair in zip(LETTERS, row.texts(key, at_least=2), strict=False))
    letters = LETTERS[: len(options)]
    if row.text("answer").strip() not in tuple(letters):
        raise row.wrong("answer", f"a letter among {', '.join(letters)}")
    text = f"{PROMPT}\n{ask(row.text('question'), options)}"
    gold = Gold((row.text("answer").strip(),), multiple_choice(options))
    return Question([*frames, text_part(text)], gold)


def _bare(letter: str, option: str) -> str:
    """An option without the letter that it is written with."""
    return re.sub(rf"^\s*{letter}[.):]\s*", "", option)


LAYOUT = Layout(_entries, max_new_tokens=16)
