"""VATEX, NExT-QA, Video-ChatGPT and Video-MME: prompts, gold, and where files are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from hkvprof.errors import SampleError
from hkvprof.evaluate.datasets.layouts import load_layout
from tests.evaluate.datasets.disk import (
    Disk,
    images_of,
    nextqa,
    text_of,
    vatex,
    videochatgpt,
    videomme,
    videomme_json,
    write_file,
)

LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_vatex_keeps_all_captions(tmp_path: Path) -> None:
    tasks = vatex().load(tmp_path)
    (sample,) = tasks.samples
    assert text_of(sample) == "<image>" * 4 + "Describe what happens in the video in one sentence."
    gold = tasks.gold[sample.id]
    assert (gold.references, gold.metric.name) == (
        ("A man runs.", "Someone is running."), "rouge_l",
    )  # fmt: skip
    assert gold.score("someone is running") == 1


def test_vatex_prefers_the_public_test_split(tmp_path: Path) -> None:
    disk = vatex()
    rows = [{**disk.files["vatex_validation_v1.0.json"][0], "enCap": ["Test."]}]
    disk.files["annotations/vatex_public_test_english_v1.1.json"] = rows
    (sample,) = disk.load(tmp_path).samples
    assert sample.reply == "Test."
    named = load_layout("vatex", str(tmp_path / "vatex_validation_v1.0.json"))
    assert named.samples[0].reply == "A man runs."


def test_vatex_without_captions_is_refused(tmp_path: Path) -> None:
    disk = vatex()
    del disk.files["vatex_validation_v1.0.json"][0]["enCap"]
    with pytest.raises(SampleError, match=r"v1\.0\.json\[0\]: field 'enCap' is missing"):
        disk.load(tmp_path)


def test_nextqa_has_choices_and_open_questions(tmp_path: Path) -> None:
    tasks = nextqa().load(tmp_path)
    mc, oe = tasks.samples
    assert (mc.id, mc.task, mc.reply) == ("mc-401-6", "mc-causal", "C")
    options = "\nA. run\nB. jump\nC. sit\nD. eat\nE. sleep"
    assert text_of(mc) == f"<image><image>why{options}{LETTER}"
    assert tasks.gold[mc.id].score("(C) sit") == 1
    assert (oe.id, oe.task, oe.reply) == ("oe-401-1", "oe-descriptive", "park")
    assert text_of(oe).endswith("where\nAnswer the question using a single word or phrase.")
    assert tasks.gold[oe.id].references == ("park", "garden")
    assert tasks.gold[oe.id].score("garden") == 1


@pytest.mark.parametrize(("field", "value"), [("answer", "5"), ("answer", "jump"), ("type", "XX")])
def test_nextqa_refuses_unknown_answers_and_types(field: str, value: str, tmp_path: Path) -> None:
    disk = nextqa()
    disk.files["MC/val.csv"][0][field] = value
    with pytest.raises(SampleError, match=rf"val\.csv:2: field '{field}': .*found {value}"):
        disk.load(tmp_path)


def test_nextqa_frames_may_lie_in_its_own_video_folder(tmp_path: Path) -> None:
    disk = nextqa()
    disk.images = ["NExTVideo/401/1.png"]
    assert images_of(disk.load(tmp_path).samples[0]) == ["1.png"]


def test_video_chatgpt_asks_both_wordings(tmp_path: Path) -> None:
    tasks = videochatgpt().load(tmp_path)
    assert [(s.id, s.task, text_of(s)) for s in tasks.samples] == [
        ("generic-0", "generic", "<image>What happens?"),
        ("temporal-0", "temporal", "<image>What happens?"),
        ("consistency-0-Q1", "consistency", "<image>Who runs?"),
        ("consistency-0-Q2", "consistency", "<image>Who is it that runs?"),
    ]
    assert {gold.metric.name for gold in tasks.gold.values()} == {"rouge_l"}
    assert tasks.gold["consistency-0-Q2"].references == ("A man.",)


def test_video_chatgpt_files_may_lie_in_their_folder(tmp_path: Path) -> None:
    disk = videochatgpt()
    files = {f"Benchmarking_QA/{name}": rows for name, rows in disk.files.items()}
    tasks = Disk("videochatgpt", files, disk.images).load(tmp_path)
    assert len(tasks.samples) == 4
    file = tmp_path / "Benchmarking_QA" / "temporal_qa.json"
    (sample,) = load_layout("videochatgpt", str(file)).samples
    assert sample.id == "temporal-0"


@pytest.mark.parametrize(("make", "task"), [(videomme, "short"), (videomme_json, "long")])
def test_video_mme_options_lose_their_letters(make: type[Disk], task: str, tmp_path: Path) -> None:
    tasks = make().load(tmp_path)
    (sample,) = tasks.samples
    assert (sample.id, sample.task, sample.reply) == ("001-1", task, "C")
    assert text_of(sample) == (
        "<image>Select the best answer to the following multiple-choice question based on the "
        f"video.\nHow many?\nA. One.\nB. Two.\nC. Three.\nD. Four.{LETTER}"
    )
    gold = tasks.gold["001-1"]
    assert [gold.score(text) for text in ("C. Three.", "three", "(B)", "B or C")] == [1, 1, 0, 0]


@pytest.mark.parametrize("answer", ["E", "c", "CD", "Three"])
def test_video_mme_answers_are_letters(answer: str, tmp_path: Path) -> None:
    disk = videomme()
    disk.files["videomme/test-00000-of-00001.parquet"][0]["answer"] = answer
    with pytest.raises(SampleError, match=r"row 0: field 'answer': expected a letter among A, B"):
        disk.load(tmp_path)


def test_video_mme_frames_may_go_by_the_number_of_the_video(tmp_path: Path) -> None:
    disk = videomme()
    del disk.files["videomme/test-00000-of-00001.parquet"][0]["videoID"]
    disk.images = ["frames/001/1.png"]
    assert len(disk.load(tmp_path).samples) == 1


def test_video_mme_without_a_table_is_refused(tmp_path: Path) -> None:
    root = videomme().write(tmp_path)
    path = root / "videomme" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SampleError, match="not a readable Parquet file"):
        load_layout("videomme", str(root))
    write_file(path, [{"question": "only this"}])
    with pytest.raises(SampleError, match=r"row 0: field 'duration' is missing"):
        load_layout("videomme", str(root))
