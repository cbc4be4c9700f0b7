"""The records that every reader of samples makes and everything else consumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]

SAMPLES_KEY = "sample_digests"
"""Where a profile's provenance tells which samples it was calibrated on: sorted short digests."""


def short_digest(digest: str) -> str:
    """Enough of a sample's content digest to tell it from others: 48 bits."""
    return digest[:12]


@dataclass(frozen=True)
class Turn:
    """A later question about the same context, with the expected reply."""

    question: str
    reply: str


@dataclass(frozen=True)
class Sample:
    """One prompt in the chat format of transformers.

    `messages` hold content parts: `{"type": "text", "text": ...}` (optionally with
    `"modality": "context"` for long text that plays the part of vision tokens) and
    `{"type": "image", "path": ...}` or, in memory, `{"type": "image", "image": ...}` with a
    PIL.Image or the bytes of an image file; a video is `{"type": "video", "frames": [...], "fps":
    ...}`, its frames what an image's `path` or `image` may be, or has the `path` of a video file in
    place of frames. `reply` is the expected answer; without it the model's own greedy answer is
    used.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    reply: str | None = None
    followups: tuple[Turn, ...] = field(default=())


def frames_of(part: Message) -> list[Message]:
    """The frames of a video part as image parts; a file is decoded. Raises SampleError."""
    if "path" in part:
        from hkvprof.samples.videos import decode_video

        frames, _ = decode_video(part["path"], part["fps"])
        return [{"type": "image", "image": frame} for frame in frames]
    return [
        {"type": "image", "path" if isinstance(frame, str) else "image": frame}
        for frame in part["frames"]
    ]
