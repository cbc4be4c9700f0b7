"""NExT-QA: causal, temporal and descriptive questions on videos, multiple choice or open-ended.

    <root>/test.csv or val.csv        multiple choice or open-ended, told apart by the columns
    <root>/MC/..., <root>/OE/...      the same, to have both
    <root>/frames/<video>/            frames in order

Layout: github.com/doc-doc/NExT-QA and github.com/doc-doc/NExT-OE, folder dataset/nextqa:

    video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4    answer: 0 to 4
    video,frame_count,width,height,question,answer,qid,type                   answer: text

NExT-OE's add_reference_answer_<split>.json ({video: {qid: answer}}) adds a second correct answer.
Of several splits in a folder, test is taken, then val.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.evaluate.datasets.frames import frame_parts
from hkvprof.evaluate.datasets.records import Record, as_record, read_csv, read_json
from hkvprof.evaluate.datasets.source import Entry, Layout, Question, Source, ask, text_part
from hkvprof.evaluate.metrics import LETTERS, ROUGE_L, multiple_choice
from hkvprof.evaluate.taskset import Gold

FOLDERS = ("", "MC/", "OE/", "dataset/nextqa/")
SPLITS = ("test.csv", "val.csv")
OPTIONS = ("a0", "a1", "a2", "a3", "a4")
GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}
VIDEO_FOLDERS = ("NExTVideo",)


def _entries(source: Source) -> Iterator[Entry]:
    for file in _files(source):
        rows = read_csv(source.root, file)
        more = _more_answers(source.root, file)
        for row in rows:
            kind = "mc" if set(OPTIONS) <= set(row.fields) else "oe"
            group = GROUPS.get(row.label("type")[0])
            if group is None:
                raise row.wrong("type", "a type that begins with C, T or D")
            name = f"{kind}-{row.label('video')}-{row.label('qid')}"
            make = _choice if kind == "mc" else partial(_open, more)
            yield Entry(f"{kind}-{group}", name, partial(_question, source, row, make))


def _files(source: Source) -> list[Path]:
    """The file asked for, or one split per folder."""
    if source.file is not None:
        return [source.file]
    found = [source.find_all(*(folder + split for split in SPLITS))[:1] for folder in FOLDERS]
    files = [file for first in found for file in first]
    if not files:
        raise UsageError(f"{source.root} holds neither test.csv nor val.csv (docs/tasks.md)")
    return files


def _question(source: Source, row: Record, make: Any) -> Question:
    where = f"{row.where}: field 'video'"
    frames = frame_parts(source, row.label("video"), where, VIDEO_FOLDERS)
    text, gold = make(row)
    return Question([*frames, text_part(text)], gold)


def _choice(row: Record) -> tuple[str, Gold]:
    options = tuple(row.text(key) for key in OPTIONS)
    letter = LETTERS[row.integer("answer", len(OPTIONS))]
    return ask(row.text("question"), options), Gold((letter,), multiple_choice(options))


def _open(more: Mapping[str, Mapping[str, str]], row: Record) -> tuple[str, Gold]:
    added = more.get(row.label("video"), {}).get(row.label("qid"))
    references = (row.text("answer"), *([added] if added else []))
    prompt = f"{row.text('question')}\nAnswer the question using a single word or phrase."
    return prompt, Gold(references, ROUGE_L)


def _more_answers(root: Path, file: Path) -> dict[str, dict[str, str]]:
    """Second answers by video and question id, where the split has them."""
    path = file.with_name(f"add_reference_answer_{file.stem}.json")
    if not path.is_file():
        return {}
    top = as_record(path, read_json(root, path))
    videos = {video: top.record(video) for video in top.fields}
    return {video: {qid: r.text(qid) for qid in r.fields} for video, r in videos.items()}


LAYOUT = Layout(_entries, max_new_tokens=32)
