"""What a row shows: pictures, and videos as frames listed or a folder of them; no video files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.pictures import PICTURE_SUFFIXES, Given, Part, Pictures, listed, wrong
from hkvprof.samples.parse import MAX_PARTS

DEFAULT_FPS = 2.0
"""Frames per second of a video that does not say so: the default of qwen-vl-utils."""
VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv", ".gifv",
)  # fmt: skip


@dataclass
class Media:
    """The pictures and videos of a row, taken in order; `fps` is of all of its videos."""

    pictures: Pictures
    images: list[Given]
    films: list[Given]
    fps: object = None

    @classmethod
    def of(
        cls,
        row: Mapping[str, Any],
        pictures: Pictures,
        columns: tuple[str, ...] = ("image", "images"),
    ) -> Media:
        """What the row gives: `video` holds one video (a list is its frames), `videos` several.

        Raises SampleError for sound, which nothing here reads, and for too many.
        """
        for name in ("audio", "audios"):
            if row.get(name):
                raise SampleError(f"field '{name}': sound is not read: leave such rows out")
        films: list[Given] = [("video", row["video"])] if row.get("video") else []
        images = [given for name in columns for given in listed(row.get(name), name)]
        return cls(pictures, images, films + listed(row.get("videos"), "videos"), row.get("fps"))

    @property
    def count(self) -> int:
        """Pictures and videos together."""
        return len(self.images) + len(self.films)

    def take(self, kind: str) -> Part:
        """The next picture ("image") or video. Raises SampleError naming the field."""
        if kind == "image":
            name, value = self.images.pop(0)
            return self.pictures.part(value, name)
        name, value = self.films.pop(0)
        return film(value, name, self.pictures, self.fps)

    def all(self) -> list[Part]:
        """All pictures, then all videos."""
        kinds = ["image"] * len(self.images) + ["video"] * len(self.films)
        return [self.take(kind) for kind in kinds]


def film(value: object, field: str, pictures: Pictures, fps: object = None) -> Part:
    """The video part for a list of frames' paths, or for a folder of frames in natural order.

    Raises SampleError naming the field; for a video file with what to do.
    """
    if isinstance(value, str):
        frames = list(_frames(value, field, pictures))
    elif isinstance(value, list) and value and all(isinstance(frame, str) for frame in value):
        parts = [pictures.part(p, name) for name, p in listed(value, field)]
        if not all("path" in part for part in parts):
            raise wrong(field, "the paths of frames", "pictures in the text itself")
        frames = [part["path"] for part in parts]
    else:
        raise wrong(field, "a folder of frames, or a list of their paths", value)
    return {"type": "video", "frames": frames, "fps": _rate(fps)}


def _rate(fps: object) -> float:
    """Frames per second, also as text, as tables have it."""
    if fps is None:
        return DEFAULT_FPS
    try:
        if isinstance(fps, int | float | str) and not isinstance(fps, bool):
            return float(fps)
    except (ValueError, OverflowError):
        pass
    raise wrong("fps", "a number", fps)


def _frames(written: str, field: str, pictures: Pictures) -> Iterator[str]:
    if written.lower().endswith(VIDEO_SUFFIXES):
        raise SampleError(
            f"field '{field}': {written[:80]} is a video file, and frames are read: extract them, "
            f"such as `ffmpeg -i {Path(written).name[:80]} -vf fps=2 FOLDER/%04d.png`, and give "
            "the folder"
        )
    folder = pictures.folder(written, field)
    names = [p.name for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
    if not 0 < len(names) <= MAX_PARTS:
        raise wrong(field, f"a folder of 1 to {MAX_PARTS} frames", f"{len(names)} pictures")
    for name in sorted(names, key=natural):
        yield pictures.located(str(folder / name), field)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts frame2 before frame10."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(p[0] in "0123456789", int(p) if p[0] in "0123456789" else 0, p) for p in pieces]
