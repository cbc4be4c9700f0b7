"""The layouts that people have, one small example of each, walked: all load with their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hkvprof.samples.read import Reading, load_samples
from tests.samples.layouts.shown import base64_of, encoded, paint, picture, shown, write
from tests.samples.test_videos import film

Made = tuple[Any, Reading]
"""What is given as data, and the options beside it."""
PLAIN = Reading()
ASKING = Reading(question="What?")
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
ASKED = {"type": "text", "text": "What?"}
REPLY = {"role": "assistant", "content": "Red."}
ROW = {"question": "What?", "answer": "Red."}


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*parts, ASKED]}, REPLY]}


def llava(folder: Path) -> Made:
    paint(folder / "coco" / "1.jpg", "red")
    rows = [{"id": "1", "image": "1.jpg", "conversations": TURNS}]
    return write(folder / "json" / "llava.json", rows), Reading(image_folder=folder / "coco")


def sharegpt(folder: Path) -> Made:
    paint(folder / "images" / "1.png", "red")
    return write(folder / "rows.json", [{"images": ["1.png"], "conversations": TURNS}]), PLAIN


def openai_file(folder: Path) -> Made:
    paint(folder / "1.png", "red")
    part = {"type": "image_url", "image_url": {"url": "1.png"}}
    return write(folder / "chats.jsonl", [chat(part)]), PLAIN


def openai_base64(folder: Path) -> Made:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of('red')}"}}
    return write(folder / "chats.jsonl", [chat(part)]), PLAIN


def openai_list(folder: Path) -> Made:
    """Without ids, in a JSON list."""
    part = {"type": "image_url", "image_url": f"data:image/png;base64,{base64_of('red')}"}
    return write(folder / "chats.json", [chat(part)]), PLAIN


def qwen_vl_utils(folder: Path) -> Made:
    paint(folder / "1.png", "red")
    return write(folder / "q.json", [chat({"type": "image", "image": "file://1.png"})]), PLAIN


def milebench(folder: Path) -> Made:
    paint(folder / "Task" / "images" / "1.png", "red")
    instance = {"context": "{image#1}What?", "images_path": ["1.png"]}
    data = [{"sample_id": 1, "task_instruction_id": 0, "task_instance": instance,
             "response": "Red."}]  # fmt: skip
    top = {"meta_data": {"task_instruction": ["Look."]}, "data": data}
    write(folder / "Task" / "Task.json", top)
    return folder, PLAIN


def vqa(folder: Path) -> Made:
    paint(folder / "val2014" / "COCO_val2014_000000000007.jpg", "red")
    question = {"image_id": 7, "question": "What?", "question_id": 70}
    answer = {"question_id": 70, "multiple_choice_answer": "Red.", "answers": []}
    write(folder / "v2_annotations_val2014.json", {"annotations": [answer]})
    top = {"data_subtype": "val2014", "questions": [question]}
    return write(folder / "v2_questions_val2014.json", top), PLAIN


def textvqa(folder: Path) -> Made:
    paint(folder / "train_images" / "abc.jpg", "red")
    row = {"image_id": "abc", "question": "What?", "question_id": 1, "answers": ["Red."] * 10}
    return write(folder / "TextVQA_0.5.1_val.json", {"data": [row]}), PLAIN


def mmmu(folder: Path) -> Made:
    paint(folder / "1.png", "red")
    row = {"id": "a", "question": "<image 1>What?", "options": "[]", "answer": "Red.",
           "image_1": "1.png", "image_2": None}  # fmt: skip
    return write(folder / "rows.json", [row]), PLAIN


def cauldron(folder: Path) -> Made:
    row = {"images": [{"bytes": encoded("red"), "path": None}],
           "texts": [{"user": "What?", "assistant": "Red.", "source": "x"}]}  # fmt: skip
    return [row], PLAIN


def chartqa(folder: Path) -> Made:
    paint(folder / "png" / "1.png", "red")
    row = {"imgname": "1.png", "query": "What?", "label": "Red."}
    return write(folder / "test_human.json", [row]), PLAIN


def alpaca(folder: Path) -> Made:
    row = {"instruction": "What?", "input": "", "output": "Red."}
    return write(folder / "alpaca_data.json", [row]), PLAIN


def plain_text(folder: Path) -> Made:
    return write(folder / "book.txt", "Some words.\n"), ASKING


def csv(folder: Path) -> Made:
    paint(folder / "1.png", "red")
    return write(folder / "rows.csv", "image,question,answer\n1.png,What?,Red.\n"), PLAIN


def parquet(folder: Path) -> Made:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    rows = [{**ROW, "image": {"bytes": encoded("red"), "path": "1.png"}}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet", PLAIN


def parquets(folder: Path) -> Made:
    """A folder of them, as the hub has it."""
    parquet(folder / "data")[0].rename(folder / "data" / "train-00000-of-00001.parquet")
    return folder, PLAIN


def in_memory(folder: Path) -> Made:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(
        [{**ROW, "picture": 1, "image": {"bytes": encoded("red"), "path": None}}]
    )
    return made.cast_column("image", datasets.Image()), PLAIN


def saved(folder: Path) -> Made:
    in_memory(folder)[0].save_to_disk(folder / "saved")
    return folder / "saved", PLAIN


def pil(folder: Path) -> Made:
    return [{**ROW, "image": picture("red")}], PLAIN


def folder_of_pictures(folder: Path) -> Made:
    paint(folder / "a" / "1.png", "red")
    return folder, ASKING


def folders_of_frames(folder: Path) -> Made:
    paint(folder / "clip" / "1.png", "red")
    return folder, Reading("videos", question="What?")


def folder_of_videos(folder: Path) -> Made:
    film(folder / "clip.mp4", ["red"])
    return folder, ASKING


PICTURE = "user: [red]What?\n= Red."
WALK: dict[Callable[[Path], Made], tuple[str, str]] = {
    llava: ("llava", "user: [red]\nWhat?\n= Red."),
    sharegpt: ("llava", "user: [red]\nWhat?\n= Red."),
    openai_file: ("chat", PICTURE),
    openai_base64: ("chat", PICTURE),
    openai_list: ("chat", PICTURE),
    qwen_vl_utils: ("chat", PICTURE),
    milebench: ("milebench", "user: Look.\n[red]What?\n= Red."),
    vqa: ("questions", PICTURE),
    textvqa: ("questions", PICTURE),
    mmmu: ("mmmu", PICTURE),
    cauldron: ("cauldron", PICTURE),
    chartqa: ("chartqa", PICTURE),
    alpaca: ("alpaca", "user: What?\n= Red."),
    plain_text: ("text", "user: Some words.\nWhat?"),
    csv: ("questions", PICTURE),
    parquet: ("questions", PICTURE),
    parquets: ("questions", PICTURE),
    in_memory: ("hkvprof", PICTURE),
    saved: ("hkvprof", PICTURE),
    pil: ("questions", PICTURE),
    folder_of_pictures: ("pictures", "user: [red]What?"),
    folders_of_frames: ("videos", "user: [red@2.0]What?"),
    folder_of_videos: ("videos", "user: [red red@2.0]What?"),
}


@pytest.mark.parametrize("make", WALK, ids=lambda make: make.__name__)
def test_it_loads_with_its_pictures(make: Callable[[Path], Made], tmp_path: Path) -> None:
    source, reading = make(tmp_path)
    loaded = load_samples(source, reading=reading)
    name, text = WALK[make]
    assert loaded.recognised.name == name
    assert [shown(sample) for sample in loaded.samples] == [text]
    if name != "hkvprof":
        lines = loaded.recognised.lines()
        assert lines[0].endswith(f"(--data-format {name})")
        assert len(lines) > 1, "what becomes of which field is said"


def test_all_that_people_have_are_walked() -> None:
    assert len(WALK) == 23
