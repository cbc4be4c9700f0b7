"""Folders: MileBench (github.com/MileBench/MileBench), pictures with one question, texts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.datasets.layouts import load_layout
from hkvprof.samples.read import load_samples
from tests.evaluate.datasets.disk import milebench
from tests.samples.layouts.shown import load, paint, shown, write


@pytest.mark.parametrize(
    "context",
    ["Before {image#1} after {image#2}. What moved?", "no mark", "only {image#2}",
     "{image#1}{image#2}{image#3}{image#0}", "{table#2} then {image#1} and {image#1}"],
)  # fmt: skip
def test_milebench_asks_as_evaluation_does(tmp_path: Path, context: str) -> None:
    """The same parts and replies as `hkvprof eval --tasks milebench:...`, picture by picture."""
    disk = milebench()
    for content in disk.files.values():
        content["data"][0]["task_instance"]["context"] = context
    root = disk.write(tmp_path)
    loaded = load_samples(root)
    assert loaded.recognised.name == "milebench"
    wanted = {sample.id: sample for sample in load_layout("milebench", str(root)).samples}
    assert {sample.id: sample for sample in loaded.samples} == wanted
    one = load_samples(root / "StateChange")
    assert [sample.task for sample in one.samples] == ["StateChange"]
    assert load_samples(root / "StateChange" / "StateChange.json").samples[0].reply == "B"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task_instruction_id": 9}, "field 'task_instruction_id': expected the number of a text"),
        ({"task_instance": []}, "field 'task_instance': expected an object"),
        (
            {"task_instance": {"context": "x", "images_path": ["none.png"]}},
            "images_path[0]': no image",
        ),
        ({"task_instance": {"context": "x", "images_path": ["../../../x.png"]}}, "leads out of"),
        ({"task_instance": {"images_path": []}}, "field 'task_instance.context': expected text"),
        ({"response": None}, "field 'response' is missing"),
    ],
)
def test_milebench_says_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    disk = deepcopy(milebench())
    disk.files["StateChange/StateChange.json"]["data"][0] |= change
    with pytest.raises(SampleError) as caught:
        load_samples(disk.write(tmp_path))
    assert "StateChange.json: data[0]: " in str(caught.value)
    assert expected in str(caught.value)


def test_a_folder_of_pictures_needs_a_question(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "red")
    paint(tmp_path / "more" / "b.jpg", "blue")
    write(tmp_path / "README.md", "x")
    with pytest.raises(UsageError, match="2 pictures without questions: give one for all with"):
        load_samples(tmp_path)
    loaded = load(tmp_path, question="What?")
    assert [(s.id, shown(s)) for s in loaded.samples] == [
        ("a.png", "user: [red]What?"),
        ("more/b.jpg", "user: [blue]What?"),
    ]
    assert "  --question  question" in loaded.recognised.lines()
    assert shown(load(tmp_path, question="<image> or?").samples[0]) == "user: [red] or?"
    with pytest.raises(UsageError, match="--question is empty"):
        load(tmp_path, question=" ")
    write(tmp_path / "c.png", "no picture")
    assert len(load(tmp_path, question="What?", on_error="skip").skipped) == 1


def test_pictures_with_a_table_of_names(tmp_path: Path) -> None:
    """huggingface.co/docs/datasets/image_load: metadata.csv with file_name."""
    paint(tmp_path / "a.png", "red")
    write(tmp_path / "metadata.csv", "file_name,text\na.png,It is red.\n")
    loaded = load(tmp_path, question="What?")
    assert [shown(s) for s in loaded.samples] == ["user: [red]What?\n= It is red."]
    with pytest.raises(SampleError, match="videos without questions: give one for all with"):
        load_samples(tmp_path)
    assert [s.id for s in load(tmp_path, "pictures", question="What?").samples] == ["a.png"]


def test_folders_of_frames(tmp_path: Path) -> None:
    for name, colours in (("b", ["red"]), ("a", ["blue", "red"])):
        for number, colour in enumerate(colours):
            paint(tmp_path / name / f"{number:04d}.jpg", colour)
    loaded = load(tmp_path, "videos", question="What happens?")
    assert [(s.id, shown(s)) for s in loaded.samples] == [
        ("a", "user: [blue red@2.0]What happens?"),
        ("b", "user: [red@2.0]What happens?"),
    ]
    with pytest.raises(UsageError, match="if they are frames, a folder per video: --data-format"):
        load_samples(tmp_path)
    with pytest.raises(SampleError, match="videos without questions: give one for all"):
        load(tmp_path, "videos")
