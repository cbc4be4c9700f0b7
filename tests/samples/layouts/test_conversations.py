"""Conversations of LLaVA and ShareGPT: github.com/haotian-liu/LLaVA/blob/main/docs/
Finetune_Custom_Data.md, github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples.read import load_samples
from tests.samples.layouts.shown import load, paint, shown, write


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": v} for i, v in enumerate(said)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in ("red", "green", "blue"):
        paint(tmp_path / "images" / f"{colour}.png", colour)
    return tmp_path


def llava(folder: Path, **more: Any) -> Path:
    row = {"id": "a", "image": "images/red.png", "conversations": turns("<image>\nWhat?", "Red.")}
    return write(folder / "llava.json", [{**row, **more}])


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(SampleError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def test_llava(folder: Path) -> None:
    rows = [
        {"id": "a", "image": "red.png", "conversations": turns("<image>\nWhat?", "Red.")},
        {"id": "b", "image": "images/blue.png",
         "conversations": turns("So?\n<image>", "Blue.", "Sure?", "Yes.")},
        {"id": "c", "conversations": turns("No picture.", "None.")},
    ]  # fmt: skip
    loaded = load_samples(write(folder / "llava.json", rows))
    assert [sample.id for sample in loaded.samples] == ["a", "b", "c"]
    assert [shown(sample) for sample in loaded.samples] == [
        "user: [red]\nWhat?\n= Red.",
        "user: So?\n[blue]\nassistant: Blue.\nuser: Sure?\n= Yes.",
        "user: No picture.\n= None.",
    ]
    assert loaded.tasks == {"llava": 3}
    assert loaded.recognised.lines() == [
        "recognised: conversations of LLaVA or ShareGPT (--data-format llava)",
        "  conversations  messages; the last one of gpt becomes the reply",
        "  image          picture in the place of <image>",
        "  id             id",
    ]


def test_several_pictures_and_a_system_message(folder: Path) -> None:
    row = {"system": "Be brief.", "images": ["images/red.png", "images/green.png"],
           "conversations": turns("<image> or <image>?", "Both.")}  # fmt: skip
    (sample,) = load_samples(write(folder / "set.jsonl", [row])).samples
    assert shown(sample) == "system: Be brief.\nuser: [red] or [green]?\n= Both."
    assert sample.id == "set-000000"


def test_videos_as_folders_of_frames(folder: Path) -> None:
    """In natural order, in the places of <video>."""
    for number, colour in ((10, "blue"), (2, "red"), (1, "green")):
        paint(folder / "clips" / "a" / f"f{number}.png", colour)
    rows = [{"video": "clips/a", "conversations": turns("<video>\nWhat?", "x")},
            {"videos": [["images/red.png"], "clips/a"], "images": ["images/blue.png"], "fps": 4,
             "conversations": turns("<video><image><video>", "x")}]  # fmt: skip
    loaded = load_samples(write(folder / "set.json", rows))
    assert [shown(sample) for sample in loaded.samples] == [
        "user: [green red blue@2.0]\nWhat?\n= x",
        "user: [red@4.0][blue][green red blue@4.0]\n= x",
    ]


def test_the_only_file_of_a_folder_is_taken(folder: Path) -> None:
    llava(folder)
    assert len(load_samples(folder).samples) == 1
    write(folder / "other.json", [])
    with pytest.raises(UsageError, match=r"several files of data: give one \(llava.json, other"):
        load_samples(folder)


def test_pictures_in_a_folder_of_their_own(tmp_path: Path) -> None:
    paint(tmp_path / "coco" / "train2017" / "1.png", "green")
    path = llava(tmp_path / "json", image="train2017/1.png")
    assert "--image-folder names the folder" in refused(path)
    (sample,) = load(path, image_folder=tmp_path / "coco").samples
    assert shown(sample) == "user: [green]\nWhat?\n= Red."
    path = llava(tmp_path / "json", image=str(tmp_path / "coco" / "train2017" / "1.png"))
    assert "leads out of" in refused(path)
    assert len(load(path, image_folder=tmp_path / "coco").samples) == 1


def test_ids_that_repeat_are_numbered(folder: Path) -> None:
    row = {"id": "same", "conversations": turns("Hi.", "Ho.")}
    loaded = load_samples(write(folder / "mix.json", [row, row]))
    assert [sample.id for sample in loaded.samples] == ["mix-000000", "mix-000001"]
    assert "  (row number)   id" in loaded.recognised.lines()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"image": "none.png"}, "record 0: field 'image': no image file none.png in"),
        ({"image": "../out.png"}, "field 'image': ../out.png leads out of"),
        ({"image": "link.png"}, "field 'image': link.png leads out of"),
        ({"image": "/etc/hostname"}, "field 'image': /etc/hostname leads out of"),
        ({"image": "text.png"}, "field 'image': "),
        ({"image": "https://a.b/c.png"}, "field 'image': https://a.b/c.png is a web address"),
        ({"image": 7}, "field 'image': expected a picture"),
        ({"image": "a\nb"}, "field 'image': expected the path of a picture, found a\\nb"),
        ({"image": "a" * 300}, "field 'image': cannot read"),
        ({"image": None}, "found 1 places <image> and 0 pictures"),
        ({"images": ["images/red.png"]}, "found 1 places <image> and 2 pictures"),
        ({"conversations": turns("What?", "Red.")}, "found 0 places <image> and 1 pictures"),
        ({"conversations": turns("<image>?", "<image>"), "images": ["images/red.png"]},
         "field 'conversations': expected text alone in the assistant's last message"),
        ({"conversations": turns("<image><video>?", "x")},
         "found 1 places <video> and 0 videos"),
        ({"conversations": turns("<audio>?", "x")}, "'conversations': <audio> is sound"),
        ({"audio": "a.wav"}, "field 'audio': sound is not read"),
        ({"videos": ["a"], "conversations": turns("<image><video>?", "x")},
         "field 'videos[0]': no image file a in"),
        ({"videos": ["../x"], "conversations": turns("<image><video>?", "x")},
         "field 'videos[0]': ../x leads out of"),
        ({"video": "images", "fps": "x", "conversations": turns("<image><video>?", "x")},
         "field 'fps': expected a number above 0, at most 1000, found x"),
        ({"video": "empty", "conversations": turns("<image><video>?", "x")},
         "field 'video': empty: expected 1 to 4096 frames, found 0 pictures"),
        ({"conversations": []}, "field 'conversations': expected a list of turns"),
        ({"conversations": ["x"]}, "field 'conversations[0]': expected an object with 'from'"),
        ({"conversations": [{"from": "human"}]}, "field 'conversations[0].value' is missing"),
        ({"conversations": [{"from": "tool", "value": "x"}]},
         "field 'conversations[0].from': expected one of human, user"),
        ({"conversations": [{"from": "human", "value": 7.5}, {"from": "gpt", "value": ["x"]}]},
         "field 'conversations[1].value': expected text"),
        ({"video": "a.mp4"}, "found 0 places <video> and 1 videos"),
        ({"video": "a.mp4", "conversations": turns("<image><video>?", "x")},
         "field 'video': no video file a.mp4 in"),
        ({"images": ["x"] * 5000}, "field 'images': expected at most 4096 pictures"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_taken_says_why(folder: Path, more: dict, expected: str) -> None:
    paint(folder.parent / "out.png", "red")
    (folder / "link.png").symlink_to(folder.parent / "out.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty").mkdir()
    message = refused(llava(folder, **more))
    assert expected in message
    assert len(message) < 900
    assert load_samples(
        write(folder / "both.jsonl", [{"conversations": turns("Hi.", "Ho.")},
                                      {"conversations": turns("<image>", "x")}]),
        on_error="skip",
    ).skipped  # fmt: skip


SAID = st.lists(st.sampled_from(["<image>", " text ", "\n"]), max_size=5)
ONCE = [HealthCheck.function_scoped_fixture]


@given(st.lists(SAID, min_size=1, max_size=4), st.integers(0, 6))
@settings(max_examples=60, deadline=None, suppress_health_check=ONCE)
def test_places_equal_pictures_or_it_is_refused(
    folder: Path, said: list[list[str]], count: int
) -> None:
    """Whatever is loaded shows exactly the given pictures, in order."""
    values = ["".join(pieces) or "-" for pieces in said]
    if len(values) % 2 == 0:
        values.append("end")
    names = ["red", "green", "blue", "red", "blue", "green"][:count]
    row = {"images": [f"images/{name}.png" for name in names], "conversations": turns(*values)}
    path = write(folder / "any.jsonl", [row])
    if sum(value.count("<image>") for value in values) != count:
        assert "places <image> and" in refused(path)
        return
    (sample,) = load_samples(path).samples
    parts = [p for m in sample.messages if not isinstance(m["content"], str) for p in m["content"]]
    seen = [Path(part["path"]).stem for part in parts if part["type"] == "image"]
    assert seen == names
    assert "<image>" not in shown(sample)
