"""Rows of every layout, changed anywhere: loaded with all their pictures, or one error of ours."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples.layouts.recognise import LAYOUTS
from hkvprof.samples.read import Sample
from tests.fuzz import jsons
from tests.fuzz.raw import bytes_mutated
from tests.samples.layouts.shown import base64_of, load, paint, shown, write

URL = f"data:image/png;base64,{base64_of('red')}"
ROWS: dict[str, dict[str, Any]] = {
    "llava": {"id": "a", "images": ["red.png", "blue.png"], "system": "x", "conversations": [
        {"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "y"}]},
    "chat": {"messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "?"},
            {"type": "image", "image": "file://blue.png"},
            {"type": "video", "video": ["red.png"], "fps": 1}]},
        {"role": "assistant", "content": "y"}]},
    "questions": {"question_id": 1, "image": "red.png", "question": "?", "answers": ["y", "z"]},
    "chartqa": {"imgname": "red.png", "query": "?", "label": "3"},
    "mmmu": {"id": "a", "question": "<image 1>?", "options": "['<image 2>']", "answer": "A",
             "image_1": "red.png", "image_2": URL, "subfield": "Art"},
    "cauldron": {"images": ["red.png"], "texts": [{"user": "?", "assistant": "y"}] * 2},
    "milebench": {"task_instance": {"context": "{image#1}?", "images_path": ["../red.png"],
                                    "choice_list": ["a", "b"]}, "images": "x", "response": "a",
                  "meta_data": {"task_instruction": ["z"]}, "task_instruction_id": 0},
    "alpaca": {"instruction": "<image>?", "input": "x", "output": "y", "images": ["red.png"],
               "history": [["a", "b"]], "system": "s"},
    "videos": {"video": ["red.png", "blue.png"], "fps": 3},
    "pictures": {"image": "red.png", "text": "y"},
    "text": {"text": "words"},
}  # fmt: skip


SEARCH = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    (made / "x").mkdir()
    for colour in ("red", "blue"):
        paint(made / f"{colour}.png", colour)
    return made


def question_of(layout: str) -> dict[str, str]:
    return {"question": "what?"} if layout in ("pictures", "videos") else {}


def count_pictures(sample: Sample) -> int:
    parts = [p for m in sample.messages if isinstance(m["content"], list) for p in m["content"]]
    return sum(len(part.get("frames", [0])) for part in parts if part["type"] != "text")


def test_every_layout_has_a_row() -> None:
    assert set(ROWS) == set(LAYOUTS)


def test_every_layout_stands_in_the_docs_with_its_source() -> None:
    page = (Path(__file__).parents[3] / "docs" / "calibration.md").read_text(encoding="utf-8")
    for layout in LAYOUTS.values():
        (line,) = re.findall(rf"^\| `{layout.name}` \| .*", page, flags=re.M)
        assert layout.source in line


@pytest.mark.parametrize("layout", ROWS)
def test_rows_are_recognised_and_show_what_they_name(layout: str, folder: Path) -> None:
    """As many pictures as the row names, each in one place."""
    loaded = load(write(folder / "rows.json", [ROWS[layout]]), **question_of(layout))
    assert loaded.recognised.name == layout
    named = json.dumps(ROWS[layout])
    (sample,) = loaded.samples
    assert count_pictures(sample) == named.count(".png") + named.count("data:image")
    assert "<image" not in shown(sample)


TOPS: dict[str, dict[str, Any]] = {
    "questions.json": {"data_subtype": "val2014", "questions": [
        {"image_id": 1, "question": "?", "question_id": 2}]},
    "annotations val2014.json": {"annotations": [
        {"question_id": 2, "multiple_choice_answer": "y", "answers": [{"answer": "y"}]}]},
    "data.json": {"data": [{"image_id": "red", "question": "?", "answers": ["y"]}]},
    "task.json": {"meta_data": {"task_instruction": ["z"]}, "data": [
        {"sample_id": 1, **{key: ROWS["milebench"][key] for key in
                            ("task_instance", "response", "task_instruction_id")}}]},
}  # fmt: skip
"""Whole files; VQA's two belong together."""


def load_or_refuse(path: Path, layout: str | None = None, **question: str) -> None:
    """No error but ours, short enough to read; no place without its picture."""
    try:
        loaded = load(path, layout, **question)
    except (SampleError, UsageError) as error:
        message = str(error)
    else:
        message = ""
        marked = loaded.recognised.name in ("text", "hkvprof")  # text may say what it likes
        assert marked or not any("<image>" in shown(sample) for sample in loaded.samples)
    assert len(message) < 2100


@pytest.mark.parametrize("layout", ROWS)
@given(seed=st.integers(0, 2**32))
@SEARCH
def test_changed_rows_are_loaded_whole_or_refused(layout: str, folder: Path, seed: int) -> None:
    random = Random(seed)
    line = jsons.text_of(random, jsons.mutated(random, copy.deepcopy(ROWS[layout])))
    path = folder / f"changed.{random.choice(['json', 'jsonl'])}"
    written = f"[{line}]" if path.suffix == ".json" else line
    path.write_bytes(written.encode("utf-8", "surrogatepass"))
    wanted = random.choice([None, layout])
    load_or_refuse(path, wanted, **(question_of(layout) if wanted else {}))


@pytest.mark.parametrize("name", TOPS)
@given(seed=st.integers(0, 2**32))
@SEARCH
def test_changed_files_are_loaded_whole_or_refused(name: str, folder: Path, seed: int) -> None:
    random = Random(seed)
    place = folder / "files"
    paint(place / "COCO_val2014_000000000001.jpg", "red")
    for other, top in TOPS.items():
        value = jsons.mutated(random, copy.deepcopy(top)) if other == name else top
        written = jsons.text_of(random, value).encode("utf-8", "surrogatepass")
        (place / other).write_bytes(written)
    for path in TOPS:
        load_or_refuse(place / path)


def files(folder: Path) -> dict[str, bytes]:
    """The same two rows in every kind of file, as bytes."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"id": "a", "question": "a, b?", "image": "red.png", "answer": "x"},
            {"id": "b", "question": 'say "hi"', "image": "blue.png", "answer": "y"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "sound.parquet")
    table = 'id,question,image,answer\na,"a, b?",red.png,x\nb,"say ""hi""",blue.png,y\n'
    return {
        "json": json.dumps(rows).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "csv": table.encode(),
        "tsv": table.replace(",", "\t").encode(),
        "txt": b"Some words.\nMore of them.\n",
        "parquet": (folder / "sound.parquet").read_bytes(),
    }


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "txt", "parquet"])
def test_damaged_files_are_loaded_or_refused(kind: str, folder: Path) -> None:
    sound = files(folder)[kind]
    (folder / f"sound.{kind}").write_bytes(sound)
    assert len(load(folder / f"sound.{kind}").samples) == (1 if kind == "txt" else 2)
    random = Random(kind)
    for _ in range(60):
        path = folder / f"damaged.{kind}"
        path.write_bytes(bytes_mutated(random, sound, head=len(sound)))
        load_or_refuse(path)
