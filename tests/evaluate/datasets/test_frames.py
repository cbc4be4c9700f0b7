"""Folders of frames: order, spread, and what is said where there are none."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkvprof.errors import SampleError
from hkvprof.evaluate.datasets import videos
from hkvprof.evaluate.datasets.frames import spread
from hkvprof.evaluate.datasets.layouts import listed, load_layout
from hkvprof.evaluate.datasets.source import Source
from tests.evaluate.datasets.disk import Disk, images_of, vatex

VIDEO = "abc_000001_000011"


def with_frames(*names: str) -> Disk:
    disk = vatex()
    disk.images = [f"frames/{VIDEO}/{name}" for name in names]
    return disk


def test_frames_come_in_natural_order(tmp_path: Path) -> None:
    disk = with_frames("f10.png", "f9.jpg", "f1.PNG", "f100.webp", "a.bmp")
    (sample,) = disk.load(tmp_path).samples
    assert images_of(sample) == ["a.bmp", "f1.PNG", "f9.jpg", "f10.png", "f100.webp"]


def test_at_most_so_many_frames_are_used_evenly_spread(tmp_path: Path) -> None:
    disk = with_frames(*(f"{n:03d}.png" for n in range(40)))
    (sample,) = disk.load(tmp_path, max_frames=4).samples
    assert images_of(sample) == ["005.png", "015.png", "025.png", "035.png"]
    (sample,) = load_layout("vatex", str(tmp_path)).samples
    assert len(images_of(sample)) == 16


@given(total=st.integers(1, 300), count=st.integers(1, 400))
def test_the_spread_is_ordered_even_and_symmetric(total: int, count: int) -> None:
    names = [str(number) for number in range(total)]
    chosen = [int(name) for name in spread(names, count)]
    assert len(chosen) == min(total, count)
    assert chosen == sorted(set(chosen))
    gaps = [after - before for before, after in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(chosen[0] - (total - 1 - chosen[-1])) <= 1


def test_other_files_are_no_frames(tmp_path: Path) -> None:
    disk = with_frames("1.png")
    folder = disk.write(tmp_path) / "frames" / VIDEO
    for name in ("notes.txt", ".hidden.png", "1.npy"):
        (folder / name).write_bytes(b"x")
    (sample,) = load_layout("vatex", str(tmp_path)).samples
    assert images_of(sample) == ["1.png"]


@pytest.mark.parametrize("place", ["frames", "videos"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_a_video_file_alone_is_refused_with_what_to_do(
    place: str, suffix: str, tmp_path: Path
) -> None:
    disk = with_frames()
    disk.write(tmp_path)
    (tmp_path / place).mkdir()
    (tmp_path / place / f"{VIDEO}{suffix}").write_bytes(b"video")
    with pytest.raises(SampleError) as caught:
        load_layout("vatex", str(tmp_path))
    said = str(caught.value)
    assert f"[0]: field 'videoID': {tmp_path}/{place}/{VIDEO}{suffix} is a video file" in said
    assert f"extract them into {tmp_path}/frames/{VIDEO}/" in said
    assert "ffmpeg" in said


def test_a_folder_without_frames_is_refused(tmp_path: Path) -> None:
    disk = with_frames()
    (disk.write(tmp_path) / "frames" / VIDEO).mkdir(parents=True)
    with pytest.raises(SampleError, match=r"field 'videoID': .* holds no image"):
        load_layout("vatex", str(tmp_path))


def test_a_damaged_frame_is_refused(tmp_path: Path) -> None:
    root = with_frames("1.png", "2.png").write(tmp_path)
    (root / "frames" / VIDEO / "2.png").write_bytes(b"not an image")
    with pytest.raises(SampleError, match=r"field 'videoID': .*2.png is not a readable image"):
        load_layout("vatex", str(root))


def test_folders_with_too_many_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hkvprof.evaluate.datasets.frames.MAX_FILES", 2)
    with pytest.raises(SampleError, match="more than 2 files"):
        with_frames("1.png", "2.png", "3.png").load(tmp_path)


def test_frames_are_one_video_where_that_is_asked(tmp_path: Path) -> None:
    root = with_frames(*(f"{n}.png" for n in range(1, 9))).write(tmp_path)
    (entry,) = listed(videos.VATEX_LAYOUT, Source.at(str(root), max_frames=4, as_video=True))
    video, question = entry.build().parts
    assert [Path(name).stem for name in video["frames"]] == ["2", "4", "6", "8"]
    assert (video["type"], video["fps"]) == ("video", 0.5), "every second of one per second"
    assert question["type"] == "text"
