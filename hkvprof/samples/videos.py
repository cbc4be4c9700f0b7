"""Video files of samples: checked at load by their header, decoded when needed; folders of frames.

Files are decoded by PyAV (extra `video`), which is also one of transformers' decoders; the frames
are those that transformers would take (`video_utils.default_sample_indices_fn`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hkvprof.errors import HkvError, SampleError
from hkvprof.lazy import require_extra
from hkvprof.samples import images

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_FPS = 2.0
"""Frames per second of a video that does not say so: the default of qwen-vl-utils."""
MAX_FPS = 1000
MAX_FRAMES = 4096
"""Most frames that are taken of a video."""
VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".wmv",
)  # fmt: skip
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif",
)  # fmt: skip
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf"
"""What FFmpeg may take a file for: no playlists, which name other files and addresses."""
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}


@dataclass(frozen=True)
class _Header:
    """Frames in a file, and how many of them there are per second."""

    frames: int
    rate: float

    def taken(self, fps: float) -> list[int]:
        """Numbers of the frames that are taken: about `fps` per second, all where there are fewer,
        at least one."""
        count = min(self.frames, max(1, int(self.frames / self.rate * fps)))
        return [number * self.frames // count for number in range(count)]


def is_video(path: Path | str) -> bool:
    """Whether a name is that of a video file."""
    return str(path).lower().endswith(VIDEO_SUFFIXES)


def find_video(root: Path, written: str, fps: float) -> dict[str, Any]:
    """The video part for a video file, or a folder of frames, `written` below `root`.

    Raises SampleError where there is none or it cannot be read, UsageError without the extra.
    """
    path = images.inside(root, written)
    if path.is_dir():
        names = frame_names(path, str(root / written))
        frames = [images.find_image(root, str(Path(written) / name)) for name in names]
        return {"type": "video", "frames": frames, "fps": fps}
    if not path.is_file():
        raise SampleError(f"no video file and no folder of frames at {root / written}")
    return file_part(path, fps)


def file_part(path: Path, fps: float) -> dict[str, Any]:
    """The video part for a file, its header checked. Raises SampleError, UsageError."""
    if not is_video(path):
        raise SampleError(f"{path.name} is no video file: expected {', '.join(VIDEO_SUFFIXES)}")
    frame_count(str(path), fps)
    return {"type": "video", "path": str(path), "fps": fps}


def frame_names(folder: Path, name: str) -> list[str]:
    """The pictures in a folder, frame2 before frame10. Raises SampleError for none or too many."""
    try:
        names = [p.name for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
    except OSError as error:
        raise SampleError(f"cannot read {name}: {error.strerror or error}") from None
    if not 0 < len(names) <= MAX_FRAMES:
        raise SampleError(f"{name}: expected 1 to {MAX_FRAMES} frames, found {len(names)} pictures")
    return sorted(names, key=natural)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts frame2 before frame10."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(p[0] in "0123456789", int(p) if p[0] in "0123456789" else 0, p) for p in pieces]


def frame_count(path: str, fps: float) -> int:
    """How many frames are taken of a file. Raises SampleError for too many, and a bad file."""
    with _opened(path) as container:
        count = len(_header(container, path).taken(fps))
    if count > MAX_FRAMES:
        raise SampleError(
            f"{path}: {count:,} frames at {fps:g} per second: expected at most {MAX_FRAMES:,}; "
            "give a lower fps"
        )
    return count


def decode_video(path: str, fps: float) -> tuple[list[Image], float]:
    """The frames of a file as RGB images, about `fps` of them per second, and how many there are
    per second in truth. Raises SampleError, UsageError without the extra."""
    with _opened(path) as container:
        header = _header(container, path)
        wanted = header.taken(fps)
        left, frames = set(wanted), []
        container.seek(0)
        for number, frame in enumerate(container.decode(video=0)):
            if number in left:
                frames.append(frame.to_image())
            if number >= wanted[-1]:
                break
    if not frames:
        raise SampleError(f"{path}: no frame could be decoded")
    return frames, len(wanted) * header.rate / header.frames


def seen_frames(part: Mapping[str, Any]) -> int:
    """How many frames a video part shows, without decoding one."""
    return len(part["frames"]) if "frames" in part else frame_count(part["path"], part["fps"])


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The container; whatever fails inside is an error that names the file."""
    av = require_extra("av", "video")
    try:
        with av.open(path, options=dict(_OPTIONS)) as container:
            yield container
    except (HkvError, MemoryError):
        raise
    except Exception as error:  # FFmpeg's errors have many classes
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SampleError(f"{path} is not a readable video file ({line[:200]})") from None


def _header(container: Any, path: str) -> _Header:
    if not container.streams.video:
        raise SampleError(f"{path} holds no pictures: expected a video")
    stream = container.streams.video[0]
    if not 0 < stream.width * stream.height <= images.MAX_PIXELS:
        raise SampleError(
            f"{path} is {stream.width} x {stream.height}: expected 1 to {images.MAX_PIXELS:,} "
            "pixels a frame"
        )
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if rate <= 0 or frames < 1:
        raise SampleError(f"{path} tells neither how many frames it has nor how many per second")
    return _Header(frames, rate)
