"""A calibration set of the embedded model, as `hkvprof demo` writes it.

The set is a folder with `samples.jsonl` (the format of docs/sample-format.md) and one PNG per
different image under `images/`. The same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hkvprof.errors import UsageError
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import TASKS, SampleShape, draw_sample

SHAPES = (
    SampleShape(8, 4, 4),
    SampleShape(6, 6, 6, followups=1),
    SampleShape(12, 4, 4, labels="random"),
    SampleShape(4, 4, 4, followups=2),
    SampleShape(16, 4, 4),
    SampleShape(8, 4, 6, followups=1, labels="random"),
    SampleShape(10, 4, 4),
)
"""Every task gets the first `per_task` of these in turn (and from the start again)."""


def calibration_sample(task: str, index: int) -> Sample:
    """Sample `index` of a task in the set."""
    return draw_sample(task, index, "calibration", SHAPES[index % len(SHAPES)])


def calibration_samples(per_task: int) -> Iterator[Sample]:
    """All samples of the set; tasks alternate, so that any beginning of the set is mixed."""
    for index in range(per_task):
        for task in TASKS:
            yield calibration_sample(task, index)


def image_name(image: Image.Image) -> str:
    """File name of an image, from its pixels."""
    pixels = image.convert("RGB")
    content = f"{pixels.size}".encode() + pixels.tobytes()
    return hashlib.sha256(content).hexdigest()[:16] + ".png"


def png_bytes(image: Image.Image) -> bytes:
    """A lossless PNG: with a palette where at most 256 colours occur, which halves the size."""
    pixels = np.array(image.convert("RGB"))
    numbers = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    used, positions = np.unique(numbers, return_inverse=True)
    if len(used) <= 256:
        indices = positions.reshape(pixels.shape[:2]).astype(np.uint8)
        colours = np.stack([used >> 16, used >> 8 & 255, used & 255], axis=1)
        image = Image.fromarray(indices)
        image.putpalette(colours.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sample_record(sample: Sample) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """The JSON record of a sample, and its images by the paths that the record names."""
    images: dict[str, Image.Image] = {}
    messages: list[dict[str, Any]] = []
    for message in sample.messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                path = f"images/{image_name(part['image'])}"
                images[path] = part["image"]
                parts.append({"type": "image", "path": path})
            else:
                parts.append(dict(part))
        messages.append({"role": message["role"], "content": parts})
    record: dict[str, Any] = {"id": sample.id, "task": sample.task, "messages": messages}
    record["reply"] = sample.reply
    record["followups"] = [
        {"question": turn.question, "reply": turn.reply} for turn in sample.followups
    ]
    return record, images


def _empty_folder(folder: Path, force: bool) -> None:
    """Make the folders; an earlier set there is removed only with `force`."""
    listing, images = folder / "samples.jsonl", folder / "images"
    if listing.exists() and not force:
        raise UsageError(f"{listing} exists: choose another folder, or --force to replace the set")
    images.mkdir(parents=True, exist_ok=True)
    if force:
        listing.unlink(missing_ok=True)
        for old in images.glob("*.png"):
            old.unlink()


def write_calibration_set(folder: Path, per_task: int, force: bool = False) -> int:
    """Write the set and return the number of samples."""
    if per_task < 1:
        raise UsageError(f"--per-task: expected at least 1, not {per_task}")
    return write_samples(folder, calibration_samples(per_task), force)


def write_samples(folder: Path, samples: Iterable[Sample], force: bool = False) -> int:
    """Write samples with their images as a folder, and return how many. Raises UsageError."""
    _empty_folder(folder, force)
    lines: list[str] = []
    for sample in samples:
        record, images = sample_record(sample)
        lines.append(json.dumps(record, ensure_ascii=False))
        for path, image in images.items():
            (folder / path).write_bytes(png_bytes(image))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
