"""What identifies samples: their text and their images' content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.samples import images
from hkvprof.samples.record import Message, Sample, frames_of


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the samples' text and images, whatever their order and the images' names."""
    total = hashlib.sha256()
    for sample in sorted(samples, key=lambda s: s.id):
        record = {
            "id": sample.id,
            "task": sample.task,
            "messages": [_hashable(message) for message in sample.messages],
            "reply": sample.reply,
            "followups": [[turn.question, turn.reply] for turn in sample.followups],
        }
        total.update(json.dumps(record, sort_keys=True).encode("utf-8") + b"\n")
    return total.hexdigest()


def _hashable(message: Message) -> dict[str, Any]:
    """The message with the SHA-256 of every image in its place."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [_hashable_part(part) for part in message["content"]]
    return {"role": message["role"], "content": parts}


def _hashable_part(part: Message) -> Message:
    if part["type"] == "video" and "path" in part:
        return {"type": "video", "sha256": _file_digest(part["path"]), "fps": part["fps"]}
    if part["type"] == "video":
        frames = [_hashable_part(frame) for frame in frames_of(part)]
        return {"type": "video", "frames": frames, "fps": part["fps"]}
    if part["type"] == "image":
        return {"type": "image", "sha256": hashlib.sha256(images.image_bytes(part)).hexdigest()}
    return dict(part)


def _file_digest(path: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error.strerror or error}") from None
