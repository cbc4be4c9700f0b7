"""Folders: MileBench (github.com/MileBench/MileBench), pictures with one question, texts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import SampleError, UsageError
from hkvprof.evaluate.datasets.layouts import load_layout
from hkvprof.samples.layouts import folders
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
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "clip.mp4").touch()
    with pytest.raises(UsageError, match=r"1 video files, and frames are read: .*ffmpeg -i clip"):
        load_samples(tmp_path / "films")


def test_links_out_of_a_folder_of_pictures(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    paint(inner / "a.png", "red")
    paint(tmp_path / "out" / "b.png", "red")
    (inner / "b.png").symlink_to(tmp_path / "out" / "b.png")
    (inner / "out").symlink_to(tmp_path / "out")
    loaded = load(inner, question="?", on_error="skip")
    assert [sample.id for sample in loaded.samples] == ["a.png"]
    assert "b.png leads out of" in loaded.skipped[0]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt", "a.parquet", "T/T.json"])
def test_files_of_data_that_lie_elsewhere(tmp_path: Path, name: str) -> None:
    """Errors would quote them."""
    secret = write(tmp_path / "secret", "root:x:0:0")
    inner = tmp_path / "inner"
    (inner / "T" / "images").mkdir(parents=True)
    (inner / name).symlink_to(secret)
    with pytest.raises(SampleError, match="leads out of") as caught:
        load_samples(inner)
    assert "root:x" not in str(caught.value)


def test_a_folder_of_pictures_that_is_a_link_out(tmp_path: Path) -> None:
    paint(tmp_path / "out" / "a.png", "red")
    rows = [{"question": "?", "image": "a.png"}]
    path = write(tmp_path / "data" / "a.json", rows)
    (tmp_path / "data" / "images").symlink_to(tmp_path / "out")
    with pytest.raises(SampleError, match=r"no image file a.png in \S+; --image-folder"):
        load_samples(path)
    assert len(load(path, image_folder=tmp_path / "data" / "images").samples) == 1


def test_texts(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "One line.\n")
    write(tmp_path / "b.txt", "x" * (folders.PIECE + 1) + "\nend\n")
    loaded = load(tmp_path, question="Sum up.")
    assert [sample.id for sample in loaded.samples] == ["a.txt-00000", "b.txt-00000", "b.txt-00001"]
    assert shown(loaded.samples[0]) == "user: One line.\nSum up."
    assert "pieces of at most 8,000 characters" in loaded.recognised.lines()[-1]
    assert shown(load_samples(tmp_path / "a.txt").samples[0]) == "user: One line.\n"
    rows = write(tmp_path / "c4.jsonl", [{"text": "One."}, {"text": "Two.", "url": "x"}])
    assert [shown(s) for s in load_samples(rows).samples] == ["user: One.", "user: Two."]
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SampleError, match=r"d.txt: expected UTF-8"):
        load_samples(tmp_path / "d.txt")
    with pytest.raises(SampleError, match="has the fields none"):
        load_samples(write(tmp_path / "e.txt", " \n"))


@given(st.text("ab \n\r", max_size=60), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_pieces_are_the_text(content: str, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "PIECE", most)
        made = list(folders.pieces(content))
    assert all(0 < len(piece) <= most and piece.strip() for piece in made)
    assert "".join("".join(made).split()) == "".join(content.split())


def test_a_folder_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "notes.md", "x")
    with pytest.raises(UsageError, match=r"holds no samples.jsonl, and no JSON, CSV or Parquet"):
        load_samples(tmp_path)
    paint(tmp_path / "a.png", "red")
    paint(tmp_path / "b.png", "red")
    monkeypatch.setattr(folders, "MAX_FILES", 1)
    with pytest.raises(UsageError, match="holds more than 1 files"):
        load(tmp_path, question="?")
