"""What a row shows: pictures, and videos as files, frames listed or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.pictures import Given, Part, Pictures, listed, wrong
from hkvprof.samples.videos import DEFAULT_FPS, MAX_FPS, frame_names, is_video


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
    """The video part for a video file, a list of frames' paths, or a folder of frames in natural
    order. Raises SampleError naming the field, UsageError for a file without the extra."""
    rate = _rate(fps)
    if isinstance(value, str) and is_video(value):
        return pictures.film(value, field, rate)
    if isinstance(value, str):
        frames = list(_frames(value, field, pictures))
    elif isinstance(value, list) and value and all(isinstance(frame, str) for frame in value):
        parts = [pictures.part(p, name) for name, p in listed(value, field)]
        if not all("path" in part for part in parts):
            raise wrong(field, "the paths of frames", "pictures in the text itself")
        frames = [part["path"] for part in parts]
    else:
        raise wrong(field, "a video file, a folder of frames, or a list of their paths", value)
    return {"type": "video", "frames": frames, "fps": rate}


def _rate(fps: object) -> float:
    """Frames per second, also as text, as tables have it."""
    if fps is None:
        return DEFAULT_FPS
    try:
        if isinstance(fps, int | float | str) and 0 < float(fps) <= MAX_FPS:
            return float(fps)
    except (ValueError, OverflowError):
        pass
    raise wrong("fps", f"a number above 0, at most {MAX_FPS}", fps)


def _frames(written: str, field: str, pictures: Pictures) -> Iterator[str]:
    folder = pictures.folder(written, field)
    try:
        names = frame_names(folder, written[:80])
    except SampleError as error:
        raise SampleError(f"field '{field}': {error}") from None
    for name in names:
        yield pictures.located(str(folder / name), field)
