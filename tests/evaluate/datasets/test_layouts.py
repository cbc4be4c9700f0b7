"""What holds for every layout: subsets, ids, refusals, and that no damage goes unnamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import HkvError, SampleError, UsageError
from hkvprof.evaluate.datasets.layouts import LAYOUTS, load_layout
from hkvprof.samples.read import open_images
from tests.evaluate.datasets.disk import BUILDERS, Disk, docvqa, images_of, vatex, write_file

EVERY = pytest.mark.parametrize("name", BUILDERS)
JSON_LIKE = [name for name in BUILDERS if name not in ("nextqa", "videomme")]
WITH_IMAGES = ("milebench", "mmniah", "docvqa", "ocrbench")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of everything in a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        yield value, key
        if isinstance(value[key], list | dict):
            yield from places(value[key])


def spots(disk: Disk) -> list[tuple[Any, Any]]:
    return [spot for content in disk.files.values() for spot in places(content)]


def test_every_layout_is_tested() -> None:
    assert {make().layout for make in BUILDERS.values()} == set(LAYOUTS)


@EVERY
def test_a_valid_dataset_gives_samples_with_images_and_gold(name: str, tmp_path: Path) -> None:
    tasks = BUILDERS[name]().load(tmp_path)
    assert tasks.samples
    assert set(tasks.gold) == {sample.id for sample in tasks.samples}
    assert len(tasks.gold) == len(tasks.samples)
    for sample in tasks.samples:
        gold = tasks.gold_of(sample, 0)
        assert sample.reply == gold.references[0]
        assert gold.score(gold.references[0]) == 1
        assert images_of(sample)
        (message,) = open_images(sample)
        assert all(part["type"] in ("image", "text") for part in message["content"])


@EVERY
def test_loading_twice_gives_the_same(name: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    first = disk.load(tmp_path)
    again = load_layout(disk.layout, str(tmp_path))
    assert first.samples == again.samples


@EVERY
def test_an_annotation_file_can_be_named_itself(name: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    everything = {sample.id for sample in disk.load(tmp_path).samples}
    file = next(iter(disk.files))
    tasks = load_layout(disk.layout, str(tmp_path / file))
    assert {sample.id for sample in tasks.samples} <= everything


@EVERY
def test_an_empty_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        load_layout(BUILDERS[name]().layout, str(tmp_path))


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "videomme"])
def test_a_dataset_without_questions_is_refused(name: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    for content in disk.files.values():
        rows = content.get("data") if isinstance(content, dict) else content
        if isinstance(rows, list):
            rows.clear()
    with pytest.raises(SampleError, match="holds no question"):
        disk.load(tmp_path)


@pytest.mark.parametrize("name", JSON_LIKE)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "invalid JSON|holds no question"),
        (b'[{"a": 1', "invalid JSON"),
        (b"\xff\xfe[]", "not UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b"17", "expected"),
        (b'[1, "two"]', "expected an object"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    disk.write(tmp_path)
    file = tmp_path / next(iter(disk.files))
    file.write_bytes(content)
    with pytest.raises(HkvError, match=says) as caught:
        load_layout(disk.layout, str(file))
    assert str(file) in str(caught.value)


@EVERY
def test_missing_images_are_named(name: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    lost = disk.images.pop(0)
    if len({Path(image).parent for image in disk.images}) == len(disk.images) == 1:
        disk.images.clear()
    disk.write(tmp_path)
    stays = Path(lost).parent.is_relative_to("frames") and disk.images
    if stays:  # a video with fewer frames is still a video
        assert load_layout(disk.layout, str(tmp_path)).samples
        return
    with pytest.raises(SampleError, match=r"field '\w+(\[\d+\])?': .*(no image|no frames)"):
        load_layout(disk.layout, str(tmp_path))


@pytest.mark.parametrize("name", WITH_IMAGES)
@pytest.mark.parametrize(
    "kind", ["../secret.png", "../" * 9 + "secret.png", "absolute", "a\0b", "a\nb.png", "x" * 300]
)
def test_images_cannot_leave_the_dataset(name: str, kind: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    disk.images.append("../secret.png")
    written = str(tmp_path / "secret.png") if kind == "absolute" else kind
    if name in ("milebench", "mmniah", "ocrbench"):  # images lie in a folder of their own
        written = written.replace("../", "../../../", 1)
    for holder, key in spots(disk):
        if isinstance(holder[key], str) and holder[key].endswith((".png", ".jpg")):
            holder[key] = written
    with pytest.raises(SampleError, match=r"leads out|is absolute|no image|path of an|too long"):
        disk.load(tmp_path / "data")


@pytest.mark.parametrize("name", ["vatex", "videochatgpt", "nextqa", "videomme", "videomme_json"])
@pytest.mark.parametrize("video", ["../secret", "..", ".", "a/b", "/etc", "a\\b", "é" * 150])
def test_videos_cannot_leave_the_dataset(name: str, video: str, tmp_path: Path) -> None:
    disk = BUILDERS[name]()
    disk.images.append("../secret/1.png")
    for holder, key in spots(disk):
        if key in ("videoID", "video_id", "video_name", "video"):
            holder[key] = video
    with pytest.raises(SampleError, match="expected the name of a video"):
        disk.load(tmp_path / "data")


def test_frames_behind_a_link_out_of_the_dataset_are_refused(tmp_path: Path) -> None:
    disk = vatex()
    disk.images = ["../elsewhere/1.png"]
    root = disk.write(tmp_path / "data")
    (root / "frames").mkdir()
    (root / "frames" / "abc_000001_000011").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SampleError, match="leads out of"):
        load_layout("vatex", str(root))


def test_annotations_behind_a_link_out_of_the_dataset_are_refused(tmp_path: Path) -> None:
    root = docvqa().write(tmp_path / "data")
    file = root / "val_v1.0_withQT.json"
    file.rename(tmp_path / "outside.json")
    file.symlink_to(tmp_path / "outside.json")
    with pytest.raises(SampleError, match="leads out of"):
        load_layout("docvqa", str(root))


def outcome(disk: Disk, root: Path) -> str | None:
    """The error that loading ends with, if any; all others than ours are raised."""
    try:
        assert disk.load(root).samples
    except HkvError as error:
        return str(error)
    return None


@EVERY
def test_a_field_that_is_gone_is_named_or_not_needed(name: str, tmp_path: Path) -> None:
    """Every field of every record in turn: the dataset loads, or an error names file and field."""
    total = len(spots(BUILDERS[name]()))
    refused = 0
    for number in range(total):
        disk = BUILDERS[name]()
        holder, key = spots(disk)[number]
        if isinstance(holder, list):
            continue
        del holder[key]
        said = outcome(disk, tmp_path / str(number))
        if said is not None:
            refused += 1
            assert str(tmp_path / str(number)) in said
            assert re.search(r"field '\w+'", said)
    assert refused


STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=2),
    st.sampled_from(["\ud800", "x" * 5000, "x" * 500, "a\nb.png", 10**30, {}, {"a": None}, [[[]]]]),
)


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ("videomme", "nextqa")])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_wrong_kinds_are_refused_by_name(name: str, data: st.DataObject) -> None:
    """Any value in any place: the dataset loads, or an error of ours names its file."""
    disk = BUILDERS[name]()
    holder, key = data.draw(st.sampled_from(spots(disk)))
    holder[key] = deepcopy(data.draw(STRANGE))
    with TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        said = outcome(disk, root)
        assert said is None or str(root) in said
        assert "\n" not in (said or "")


def many() -> Disk:
    disk = docvqa()
    row = disk.files["val_v1.0_withQT.json"]["data"].pop()
    kinds = ["form"] * 30 + ["layout"] * 6 + ["table/list"] * 3
    disk.files["val_v1.0_withQT.json"]["data"] = [
        {**row, "questionId": number, "question_types": [kind]} for number, kind in enumerate(kinds)
    ]
    return disk


def test_a_subset_is_balanced_over_sub_tasks_and_always_the_same(tmp_path: Path) -> None:
    whole = many().load(tmp_path)
    assert len(whole.samples) == 39
    some = load_layout("docvqa", str(tmp_path), max_samples=9)
    kinds = [sample.task for sample in some.samples]
    assert {kind: kinds.count(kind) for kind in kinds} == {"form": 3, "layout": 3, "table/list": 3}
    assert set(some.gold) == {sample.id for sample in some.samples}
    assert some.samples == load_layout("docvqa", str(tmp_path), max_samples=9).samples
    more = load_layout("docvqa", str(tmp_path), max_samples=12)
    assert {s.id for s in some.samples} < {s.id for s in more.samples}
    rows = many().files["val_v1.0_withQT.json"]
    rows["data"].reverse()
    write_file(tmp_path / "val_v1.0_withQT.json", rows)
    turned = load_layout("docvqa", str(tmp_path), max_samples=9)
    assert {s.id for s in turned.samples} == {s.id for s in some.samples}
    assert load_layout("docvqa", str(tmp_path), max_samples=1000).samples == tuple(
        reversed(whole.samples)
    )


def test_ids_that_occur_twice_are_refused(tmp_path: Path) -> None:
    disk = docvqa()
    disk.files["val_v1.0_withQT.json"]["data"] *= 2
    with pytest.raises(SampleError, match="'49153' occurs twice"):
        disk.load(tmp_path)


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = many().write(tmp_path)
    monkeypatch.setattr("hkvprof.evaluate.datasets.records.MAX_RECORDS", 38)
    with pytest.raises(SampleError, match="more than 38 records"):
        load_layout("docvqa", str(root))
    monkeypatch.setattr("hkvprof.evaluate.datasets.records.MAX_FILE_BYTES", 100)
    with pytest.raises(SampleError, match="at most 38 records and 100 bytes"):
        load_layout("docvqa", str(root))


def test_too_many_images_of_one_question_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hkvprof.evaluate.datasets.layouts.MAX_PARTS", 1)
    with pytest.raises(SampleError, match="2 images and texts: expected at most 1"):
        docvqa().load(tmp_path)


def test_wrong_arguments_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected one of milebench"):
        load_layout("imagenet", str(tmp_path))
    for options in ({"max_samples": 0}, {"max_frames": 0}):
        with pytest.raises(UsageError, match="expected at least 1"):
            load_layout("docvqa", str(tmp_path), **options)
