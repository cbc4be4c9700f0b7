"""Samples as one can read them, and pictures for them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from hkvprof.samples.read import LoadedSamples, Reading, Sample, load_samples, open_images

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (4, 3), COLOURS[colour])


def encoded(colour: str, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(colour).save(stream, kind)
    return stream.getvalue()


def base64_of(colour: str, kind: str = "PNG") -> str:
    return base64.b64encode(encoded(colour, kind)).decode()


def paint(path: Path, colour: str) -> Path:
    """A picture file of one colour, folders and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour).save(path)
    return path


def write(path: Path, content: Any) -> Path:
    """JSON, lines of JSON by the name, or a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def load(source: Any, layout: str | None = None, **options: Any) -> LoadedSamples:
    """As a user calls it, with options of Reading by name."""
    names = ("image_folder", "question")
    how = Reading(layout, **{name: options.pop(name) for name in names if name in options})
    return load_samples(source, reading=how, **options)


def shown(sample: Sample) -> str:
    """The roles and texts of a sample, the colour of every picture in its place, the reply."""
    lines = []
    for message in open_images(sample):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        lines.append(f"{message['role']}: {''.join(map(_part, parts))}")
    return "\n".join([*lines, *([f"= {sample.reply}"] if sample.reply is not None else [])])


def _part(part: Any) -> str:
    if part["type"] == "text":
        return str(part["text"])
    pictures = part["frames"] if part["type"] == "video" else [part["image"]]
    names = [_colour(image.getpixel((0, 0))) for image in pictures]
    return f"[{' '.join(names)}{'@' + str(part['fps']) if part['type'] == 'video' else ''}]"


def _colour(pixel: Any) -> str:
    """The nearest colour, as JPEG changes them a little."""
    return max(
        COLOURS, key=lambda name: sum(a * b for a, b in zip(COLOURS[name], pixel, strict=True))
    )
