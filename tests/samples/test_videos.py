"""Video files and folders of frames in samples; files are made with the extra's own library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import videos
from hkvprof.samples.read import LoadedSamples, load_samples, open_images
from hkvprof.samples.survey import Survey
from hkvprof.samples.videos import DEFAULT_FPS, decode_video, find_video, frame_count
from tests.samples.layouts.shown import encoded, load, paint, shown, write

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
INSTALL = r"pip install 'hkvprof\[video\]'"


@pytest.fixture
def av() -> Any:
    """PyAV, of the extra `video`."""
    return pytest.importorskip("av", reason="PyAV, of the extra `video`, is not installed")


def film(path: Path, colours: list[str], rate: int = 4, codec: str = "mpeg4") -> Path:
    """A video with a second of every colour."""
    av = pytest.importorskip("av", reason="PyAV, of the extra `video`, is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colour in colours:
            for _ in range(rate):
                pixels = np.full((48, 64, 3), COLOURS[colour], dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def native(folder: Path, part: dict[str, Any]) -> LoadedSamples:
    """A samples.jsonl with one video and a question, loaded."""
    parts = [{"type": "video", **part}, {"type": "text", "text": "?"}]
    line = {"id": "a", "task": "t", "messages": [{"role": "user", "content": parts}]}
    return load_samples(write(folder / "samples.jsonl", [line]).parent)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_file_is_a_sample_s_video(suffix: str, tmp_path: Path) -> None:
    """Matroska does not tell how many frames there are: they are counted."""
    film(tmp_path / f"clip{suffix}", ["red", "blue"])
    loaded = native(tmp_path, {"path": f"clip{suffix}"})
    assert shown(loaded.samples[0]) == f"user: [red red blue blue@{DEFAULT_FPS}]?"
    slow = native(tmp_path, {"path": f"clip{suffix}", "fps": 1})
    assert shown(slow.samples[0]) == "user: [red blue@1.0]?"
    assert slow.digest != loaded.digest
    assert Survey.of(slow.samples).frames == (2,)
    whole = native(tmp_path, {"path": f"clip{suffix}", "fps": 50})
    assert shown(whole.samples[0]).endswith("blue@4.0]?"), "the file has four frames a second"
    assert Survey.of(whole.samples).frames == (8,)


@pytest.mark.usefixtures("av")
def test_frames_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.video_utils import load_video

    path = film(tmp_path / "clip.mp4", ["red", "green", "blue"], rate=5)
    for fps in (1, 2, 3, 5):
        theirs, _ = load_video(str(path), fps=fps, backend="pyav")
        ours, rate = decode_video(str(path), fps)
        assert np.array_equal(np.stack([np.asarray(frame) for frame in ours]), theirs)
        assert rate == pytest.approx(len(theirs) / 3)
        assert frame_count(str(path), fps) == len(theirs)


def test_a_folder_of_frames_needs_no_list(tmp_path: Path) -> None:
    for number, colour in enumerate(["red", "green", "blue"]):
        paint(tmp_path / "clips" / f"frame{9 + number}.png", colour)
    write(tmp_path / "clips" / "notes.txt", "no frame")
    loaded = native(tmp_path, {"path": "clips"})
    assert shown(loaded.samples[0]) == f"user: [red green blue@{DEFAULT_FPS}]?"
    listed = [f"clips/frame{9 + number}.png" for number in range(3)]
    assert native(tmp_path, {"frames": listed}).digest == loaded.digest, "fps has a default"


def test_layouts_take_files(tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4", ["red", "blue"])
    turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "Red."}]
    rows = {
        "llava": {"video": "clip.mp4", "fps": 1, "conversations": turns},
        "questions": {"video": "clip.mp4", "fps": "1", "question": "What?", "answer": "Red."},
        "chat": {"messages": [
            {"role": "user", "content": [
                {"type": "video", "video": "file://clip.mp4", "fps": 1.0},
                {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Red."}]},
    }  # fmt: skip
    for layout, row in rows.items():
        loaded = load(write(tmp_path / "rows.json", [row]))
        assert loaded.recognised.name == layout
        assert shown(loaded.samples[0]) == "user: [red blue@1.0]What?\n= Red."


def test_a_folder_of_videos_needs_a_question(tmp_path: Path) -> None:
    film(tmp_path / "b" / "two.mp4", ["blue"])
    film(tmp_path / "one.mp4", ["red"])
    with pytest.raises(UsageError, match="2 video files without questions: give one for all"):
        load_samples(tmp_path)
    loaded = load(tmp_path, question="What?")
    assert [(s.id, shown(s)) for s in loaded.samples] == [
        ("b/two.mp4", "user: [blue blue@2.0]What?"), ("one.mp4", "user: [red red@2.0]What?"),
    ]  # fmt: skip
    assert loaded.recognised.name == "videos"
    assert len(load(tmp_path / "one.mp4", question="What?").samples) == 1
    paint(tmp_path / "c" / "1.png", "green")
    both = load(tmp_path, "videos", question="What?")
    assert [s.id for s in both.samples] == ["b/two.mp4", "c", "one.mp4"]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"path": "none.mp4"}, "content[0].path': no video file and no folder of frames at"),
        ({"path": "../x.mp4"}, "content[0].path': ../x.mp4 leads out of"),
        ({"path": "empty"}, "content[0].path': "),
        ({"path": "words.txt"}, "words.txt is no video file: expected .mp4"),
        ({"path": "clip.mp4", "fps": 0}, "content[0].fps': expected a number above 0"),
        ({"path": "clip.mp4", "frames": ["a.png"]}, "content[0].frames' is not known"),
        ({}, "content[0].frames' is missing"),
    ],
)
def test_what_cannot_be_taken_says_why(part: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "words.txt", "no video")
    with pytest.raises(SampleError) as caught:
        native(tmp_path, part)
    assert expected in str(caught.value)


@pytest.mark.usefixtures("av")
def test_what_is_no_video_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A playlist names other files and addresses: none is read."""
    write(tmp_path / "clip.mp4", "no video")
    other = film(tmp_path / "other.mp4", ["red"])
    write(tmp_path / "list.mp4", f"#EXTM3U\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n")
    (tmp_path / "picture.mp4").write_bytes(encoded("red"))
    (tmp_path / "cut.mp4").write_bytes(other.read_bytes()[:200])
    for name in ("clip", "list", "picture"):
        with pytest.raises(SampleError, match=f"{name}.mp4 is not a readable video file"):
            find_video(tmp_path, f"{name}.mp4", 2.0)
    with pytest.raises(SampleError, match=r"cut.mp4 holds no pictures: expected a video"):
        find_video(tmp_path, "cut.mp4", 2.0)
    monkeypatch.setattr(videos, "MAX_FRAMES", 3)
    with pytest.raises(SampleError, match="4 frames at 4 per second: expected at most 3"):
        find_video(tmp_path, "other.mp4", 4.0)
    monkeypatch.setattr(videos.images, "MAX_PIXELS", 100)
    with pytest.raises(SampleError, match="is 64 x 48: expected 1 to 100 pixels a frame"):
        find_video(tmp_path, "other.mp4", 1.0)


def test_a_file_that_is_damaged_behind_its_header(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.avi", ["red", "blue"])
    loaded = native(tmp_path, {"path": "clip.avi"})
    path.unlink()
    with pytest.raises(SampleError, match=r"sample 'a': .*clip.avi is not a readable video file"):
        open_images(loaded.samples[0])


def test_without_the_extra_the_refusal_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "data" / "films").mkdir(parents=True)
    (tmp_path / "data" / "films" / "clip.mp4").touch()
    with pytest.raises(UsageError, match=INSTALL):
        native(tmp_path / "data", {"path": "films/clip.mp4"})
    with pytest.raises(UsageError, match=INSTALL):
        load(tmp_path / "data" / "films", question="What?", on_error="skip")
    row = {"video": "films/clip.mp4", "question": "?"}
    with pytest.raises(UsageError, match=INSTALL):
        load(write(tmp_path / "data" / "rows.json", [row]))
