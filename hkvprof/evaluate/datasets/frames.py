"""Videos as folders of extracted frames: `frames/<video>/` with image files in order."""

from __future__ import annotations

import re
from pathlib import Path

from hkvprof.errors import SampleError
from hkvprof.evaluate.datasets.source import Part, Source, image_part

FOLDERS = ("frames", "videos")
"""Where folders of frames are looked for, besides a layout's own places."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv")
EXTRACTED_PER_SECOND = 1.0
"""At which rate frames were extracted (docs/tasks.md): what a video's own clock is told by."""
MAX_FILES = 1_000_000
MAX_NAME_BYTES = 240
"""Of a video's name; file systems take 255 with the suffix."""


def frame_parts(
    source: Source, video: str, where: str, folders: tuple[str, ...] = ()
) -> list[Part]:
    """At most `source.max_frames` frames of a video, evenly spread: image parts, or one video part.

    `where` names file, record and field. Raises SampleError where there are no frames; a video file
    alone is refused with what to do.
    """
    if video in (".", "..") or set(video) & set("/\\\0") or len(video.encode()) > MAX_NAME_BYTES:
        raise SampleError(f"{where}: expected the name of a video, found {video!r}")
    places = [source.root / folder for folder in (*FOLDERS, *folders)]
    folder = next((place / video for place in places if (place / video).is_dir()), None)
    if folder is None:
        raise SampleError(f"{where}: {_missing(places, video)}")
    names = _image_names(folder)
    if not names:
        raise SampleError(f"{where}: {folder} holds no image: expected {', '.join(IMAGES)} files")
    below = folder.relative_to(source.root).as_posix()
    kept = spread(names, source.max_frames)
    parts = [image_part(source.root, (below,), name, where) for name in kept]
    if not source.as_video:
        return parts
    rate = EXTRACTED_PER_SECOND * len(kept) / len(names)
    return [{"type": "video", "frames": [part["path"] for part in parts], "fps": rate}]


def spread(names: list[str], count: int) -> list[str]:
    """`count` names, or all, each from the middle of its share of the list."""
    count = min(count, len(names))
    return [names[(2 * i + 1) * len(names) // (2 * count)] for i in range(count)]


def _image_names(folder: Path) -> list[str]:
    """Image files in natural order: frame2 before frame10."""
    names = []
    for number, path in enumerate(folder.iterdir()):
        if number == MAX_FILES:
            raise SampleError(f"{folder} holds more than {MAX_FILES:,} files")
        if path.suffix.lower() in IMAGES and not path.name.startswith("."):
            names.append(path.name)
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p) for p in pieces], name


def _missing(places: list[Path], video: str) -> str:
    """What to say when a video has no folder of frames."""
    target = places[0] / video
    for place in places:
        for suffix in VIDEOS:
            if (file := place / f"{video}{suffix}").is_file():
                return (
                    f"{file} is a video file, and hkvprof takes frames: extract them into "
                    f"{target}/, for example `ffmpeg -i {file.name} -vf fps=1 {video}/%06d.jpg`"
                )
    return f"no frames of video {video}: expected image files in {target}/"
