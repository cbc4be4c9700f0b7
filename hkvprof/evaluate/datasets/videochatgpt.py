"""Video-ChatGPT's generative benchmark: open questions on ActivityNet videos.

    <root>/generic_qa.json, temporal_qa.json     [{"Q", "A", "video_name"}, ...]
    <root>/consistency_qa.json                   [{"Q1", "Q2", "A", "video_name"}, ...]
    <root>/frames/<video_name>/                  frames in order

Layout: github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation/README.md and
video_chatgpt/eval; the files come in a folder Benchmarking_QA, which is found too. The published
score (0 to 5) is given by GPT-3.5; ROUGE-L takes its place here and cannot be compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.datasets.frames import frame_parts
from hkvprof.evaluate.datasets.records import Record, as_records, read_json
from hkvprof.evaluate.datasets.source import Entry, Layout, Question, Source, text_part
from hkvprof.evaluate.metrics import ROUGE_L
from hkvprof.evaluate.taskset import Gold

TASKS = ("generic", "temporal", "consistency")
FOLDERS = ("", "Benchmarking_QA/", "Zero_Shot_QA/Benchmarking_QA/")
VIDEO_FOLDERS = ("Test_Videos",)


def _entries(source: Source) -> Iterator[Entry]:
    files = [
        file
        for task in TASKS
        for file in source.find_all(*(f"{folder}{task}_qa.json" for folder in FOLDERS))[:1]
    ]
    if not files:
        raise UsageError(f"{source.root} holds no {'_qa.json, '.join(TASKS)}_qa.json")
    for file in dict.fromkeys(files):
        task = file.stem.removesuffix("_qa")
        for number, row in enumerate(as_records(str(file), read_json(source.root, file))):
            for key in _question_keys(row):
                name = f"{task}-{number}-{key}" if key != "Q" else f"{task}-{number}"
                yield Entry(task, name, partial(_question, source, row, key))


def _question_keys(row: Record) -> tuple[str, ...]:
    """`Q`, or the two wordings of a question on consistency."""
    if "Q" in row:
        return ("Q",)
    if "Q1" in row and "Q2" in row:
        return ("Q1", "Q2")
    raise SampleError(f"{row.where}: field 'Q' is missing, and so are 'Q1' and 'Q2'")


def _question(source: Source, row: Record, key: str) -> Question:
    where = f"{row.where}: field 'video_name'"
    frames = frame_parts(source, row.label("video_name"), where, VIDEO_FOLDERS)
    return Question([*frames, text_part(row.text(key))], Gold((row.text("A"),), ROUGE_L))


LAYOUT = Layout(_entries, max_new_tokens=128)
