"""Layouts of questions on videos, which lie there as folders of extracted frames."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.datasets.frames import frame_parts
from hkvprof.evaluate.datasets.records import (
    Record,
    as_record,
    as_records,
    read_csv,
    read_json,
    read_parquet,
)
from hkvprof.evaluate.datasets.source import (
    DatasetQuestion,
    Layout,
    ListedQuestion,
    Source,
    ask,
    text_part,
)
from hkvprof.evaluate.metrics import LETTERS, ROUGE_L, multiple_choice
from hkvprof.evaluate.records import Gold
from hkvprof.evaluate.scorers.wups import EXACT_TYPES, WUPS, WUPS_EXACT

# NExT-QA: causal, temporal and descriptive questions on videos, multiple choice or open-ended.
#
#     <root>/test.csv or val.csv        multiple choice or open-ended, told apart by the columns
#     <root>/MC/..., <root>/OE/...      the same, to have both
#     <root>/frames/<video>/            frames in order
#
# Layout: github.com/doc-doc/NExT-QA and github.com/doc-doc/NExT-OE, folder dataset/nextqa:
#
#     video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4    answer: 0 to 4
#     video,frame_count,width,height,question,answer,qid,type                   answer: text
#
# NExT-OE's add_reference_answer_<split>.json ({video: {qid: answer}}) adds a second correct answer.
# Of several splits in a folder, test is taken, then val.

NEXTQA_FOLDERS = ("", "MC/", "OE/", "dataset/nextqa/")
NEXTQA_SPLITS = ("test.csv", "val.csv")
NEXTQA_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
NEXTQA_GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}
NEXTQA_VIDEO_FOLDERS = ("NExTVideo",)


def _nextqa_entries(source: Source) -> Iterator[ListedQuestion]:
    for file in _nextqa_files(source):
        rows = read_csv(source.root, file)
        more = _more_answers(source.root, file)
        for row in rows:
            kind = "mc" if set(NEXTQA_OPTIONS) <= set(row.fields) else "oe"
            group = NEXTQA_GROUPS.get(row.label("type")[0])
            if group is None:
                raise row.wrong("type", "a type that begins with C, T or D")
            name = f"{kind}-{row.label('video')}-{row.label('qid')}"
            make = _choice if kind == "mc" else partial(_open, more)
            yield ListedQuestion(
                f"{kind}-{group}", name, partial(_nextqa_question, source, row, make)
            )


def _nextqa_files(source: Source) -> list[Path]:
    """The file asked for, or one split per folder."""
    if source.file is not None:
        return [source.file]
    found = [
        source.find_all(*(folder + split for split in NEXTQA_SPLITS))[:1]
        for folder in NEXTQA_FOLDERS
    ]
    files = [file for first in found for file in first]
    if not files:
        raise UsageError(f"{source.root} holds neither test.csv nor val.csv (docs/tasks.md)")
    return files


def _nextqa_question(source: Source, row: Record, make: Any) -> DatasetQuestion:
    where = f"{row.where}: field 'video'"
    frames = frame_parts(source, row.label("video"), where, NEXTQA_VIDEO_FOLDERS)
    text, gold = make(row)
    return DatasetQuestion([*frames, text_part(text)], gold)


def _choice(row: Record) -> tuple[str, Gold]:
    options = tuple(row.text(key) for key in NEXTQA_OPTIONS)
    letter = LETTERS[row.integer("answer", len(NEXTQA_OPTIONS))]
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


def _nextoe_entries(source: Source) -> Iterator[ListedQuestion]:
    """NExT-OE alone, by the type of question, scored by WUPS as its eval_oe.py does it."""
    for file in _nextqa_files(source):
        rows = read_csv(source.root, file)
        more = _more_answers(source.root, file)
        for row in rows:
            if "a0" in row.fields:  # multiple choice
                break
            kind = row.label("type")
            if kind[0] not in NEXTQA_GROUPS:
                raise row.wrong("type", "a type that begins with C, T or D")
            name = f"oe-{row.label('video')}-{row.label('qid')}"
            make = partial(_nextqa_question, source, row, partial(_open_by_wups, more))
            yield ListedQuestion("TN" if kind == "TP" else kind, name, make)


def _open_by_wups(more: Mapping[str, Mapping[str, str]], row: Record) -> tuple[str, Gold]:
    prompt, gold = _open(more, row)
    return prompt, replace(gold, metric=WUPS_EXACT if row.label("type") in EXACT_TYPES else WUPS)


NEXTOE_LAYOUT = Layout(_nextoe_entries, max_new_tokens=32)
NEXTQA_LAYOUT = Layout(_nextqa_entries, max_new_tokens=32)


# VATEX: one caption of a short video against ten written by people.
#
#     <root>/vatex_validation_v1.0.json     [{"videoID": ..., "enCap": [...]}, ...]
#     <root>/frames/<videoID>/              frames in order
#
# Layout: eric-xw.github.io/vatex-website (download.html); fields as lmms-eval's task `vatex_test`
# reads them. Of several annotation files the public test split is taken, then validation; English
# captions alone.

VATEX_FILES = tuple(
    f"{folder}{name}"
    for name in ("vatex_public_test_english_v1.1.json", "vatex_validation_v1.0.json")
    for folder in ("", "annotations/")
)
VATEX_PROMPT = "Describe what happens in the video in one sentence."


def _vatex_entries(source: Source) -> Iterator[ListedQuestion]:
    file = source.find(*VATEX_FILES)
    for row in as_records(str(file), read_json(source.root, file)):
        yield ListedQuestion(
            "captioning", row.label("videoID"), partial(_vatex_question, source, row)
        )


def _vatex_question(source: Source, row: Record) -> DatasetQuestion:
    frames = frame_parts(source, row.label("videoID"), f"{row.where}: field 'videoID'")
    return DatasetQuestion([*frames, text_part(VATEX_PROMPT)], Gold(row.texts("enCap"), ROUGE_L))


VATEX_LAYOUT = Layout(_vatex_entries, max_new_tokens=64)


# Video-ChatGPT's generative benchmark: open questions on ActivityNet videos.
#
#     <root>/generic_qa.json, temporal_qa.json     [{"Q", "A", "video_name"}, ...]
#     <root>/consistency_qa.json                   [{"Q1", "Q2", "A", "video_name"}, ...]
#     <root>/frames/<video_name>/                  frames in order
#
# Layout: github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation/README.md and
# video_chatgpt/eval; the files come in a folder Benchmarking_QA, which is found too. The published
# score (0 to 5) is given by GPT-3.5; ROUGE-L takes its place here and cannot be compared with it.

VIDEOCHATGPT_TASKS = ("generic", "temporal", "consistency")
VIDEOCHATGPT_FOLDERS = ("", "Benchmarking_QA/", "Zero_Shot_QA/Benchmarking_QA/")
VIDEOCHATGPT_VIDEO_FOLDERS = ("Test_Videos",)


def _videochatgpt_entries(source: Source) -> Iterator[ListedQuestion]:
    files = [
        file
        for task in VIDEOCHATGPT_TASKS
        for file in source.find_all(
            *(f"{folder}{task}_qa.json" for folder in VIDEOCHATGPT_FOLDERS)
        )[:1]
    ]
    if not files:
        raise UsageError(f"{source.root} holds no {'_qa.json, '.join(VIDEOCHATGPT_TASKS)}_qa.json")
    for file in dict.fromkeys(files):
        task = file.stem.removesuffix("_qa")
        for number, row in enumerate(as_records(str(file), read_json(source.root, file))):
            for key in _question_keys(row):
                name = f"{task}-{number}-{key}" if key != "Q" else f"{task}-{number}"
                yield ListedQuestion(task, name, partial(_videochatgpt_question, source, row, key))


def _question_keys(row: Record) -> tuple[str, ...]:
    """`Q`, or the two wordings of a question on consistency."""
    if "Q" in row:
        return ("Q",)
    if "Q1" in row and "Q2" in row:
        return ("Q1", "Q2")
    raise SampleError(f"{row.where}: field 'Q' is missing, and so are 'Q1' and 'Q2'")


def _videochatgpt_question(source: Source, row: Record, key: str) -> DatasetQuestion:
    where = f"{row.where}: field 'video_name'"
    frames = frame_parts(source, row.label("video_name"), where, VIDEOCHATGPT_VIDEO_FOLDERS)
    return DatasetQuestion([*frames, text_part(row.text(key))], Gold((row.text("A"),), ROUGE_L))


VIDEOCHATGPT_LAYOUT = Layout(_videochatgpt_entries, max_new_tokens=128)


# Video-MME: multiple choice on short, medium and long videos, without subtitles.
#
#     <root>/videomme/test-*.parquet     one row per question: videoID, duration, options, ...
#     <root>/*.json                      one object per video with a list of questions
#     <root>/frames/<video>/             frames in order; <video> is videoID or video_id
#
# Layouts: huggingface.co/datasets/lmms-lab/Video-MME (README.md, features of config videomme) and
# github.com/BradyFU/Video-MME (README.md "Dataset Content", evaluation/output_test_template.json).

VIDEOMME_PARQUET = ("videomme/test-*.parquet", "test-*.parquet")
VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video."
)
VIDEOMME_VIDEO_FOLDERS = ("data",)


def _videomme_entries(source: Source) -> Iterator[ListedQuestion]:
    files = source.find_all(*VIDEOMME_PARQUET) or [source.find(*VIDEOMME_PARQUET, "*.json")]
    for file in files:
        if file.suffix == ".parquet":
            yield from _rows(source, file)
        else:
            yield from _videos(source, file)


def _rows(source: Source, file: Path) -> Iterator[ListedQuestion]:
    for row in read_parquet(source.root, file):
        video = "videoID" if "videoID" in row else "video_id"
        build = partial(_videomme_question, source, row, video, row, "options")
        yield ListedQuestion(row.label("duration"), row.label("question_id"), build)


def _videos(source: Source, file: Path) -> Iterator[ListedQuestion]:
    for video in as_records(str(file), read_json(source.root, file)):
        for row in video.records("questions"):
            build = partial(_videomme_question, source, video, "video_id", row, "choices")
            yield ListedQuestion(video.label("duration_category"), row.label("question_id"), build)


def _videomme_question(
    source: Source, video: Record, video_key: str, row: Record, key: str
) -> DatasetQuestion:
    where = f"{video.where}: field '{video_key}'"
    frames = frame_parts(source, video.label(video_key), where, VIDEOMME_VIDEO_FOLDERS)
    options = tuple(_bare(*pair) for pair in zip(LETTERS, row.texts(key, at_least=2), strict=False))
    letters = LETTERS[: len(options)]
    if row.text("answer").strip() not in tuple(letters):
        raise row.wrong("answer", f"a letter among {', '.join(letters)}")
    text = f"{VIDEOMME_PROMPT}\n{ask(row.text('question'), options)}"
    gold = Gold((row.text("answer").strip(),), multiple_choice(options))
    return DatasetQuestion([*frames, text_part(text)], gold)


def _bare(letter: str, option: str) -> str:
    """An option without the letter that it is written with."""
    return re.sub(rf"^\s*{letter}[.):]\s*", "", option)


VIDEOMME_LAYOUT = Layout(_videomme_entries, max_new_tokens=16)
