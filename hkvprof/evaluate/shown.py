"""Samples that a report may show beside their answers: question and small pictures, in one file."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.files import strict_json
from hkvprof.files.atomic import read_limited, write_atomically
from hkvprof.samples.images import check_header, decode
from hkvprof.samples.record import Sample, frames_of

FILE = "shown.json"
MOST_SAMPLES, MOST_PICTURES = 6, 16
SIDE, QUALITY = 160, 75
"""Pixels of a picture's longer side, and its quality as a JPEG: some 4 kB each."""
MOST_TEXT = 600
"""Characters of a question that are kept: its end, where a long text comes first."""
_MOST_BYTES, _MOST_MARKS = 4 * 2**20, 10_000


@dataclass(frozen=True)
class ShownSample:
    """What a sample asks, by turn, and its pictures as JPEG in base64."""

    questions: tuple[str, ...]
    pictures: tuple[str, ...]


def keep_shown(folder: Path, samples: Sequence[Sample]) -> None:
    """Write MOST_SAMPLES of the samples, of different tasks first. Raises HkvError, SampleError."""
    kept = {sample.id: asdict(_shown(sample)) for sample in _of_all_tasks(samples)}
    write_atomically(folder / FILE, (json.dumps(kept, sort_keys=True) + "\n").encode())


def read_shown(folder: Path) -> dict[str, ShownSample]:
    """What was kept, by sample; empty where nothing was. Raises UsageError for anything else."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        found = strict_json.loads(read_limited(path, _MOST_BYTES).decode("utf-8"), _MOST_MARKS)
        return {sample: _checked(entry) for sample, entry in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, SampleError) as error:
        raise UsageError(
            f"{path} is not what `hkvprof eval` writes ({error}): remove it, and run eval again"
        ) from None


def _of_all_tasks(samples: Sequence[Sample]) -> list[Sample]:
    seen: dict[str, int] = {}
    ranked = []
    for sample in samples:
        seen[sample.task] = seen.get(sample.task, 0) + 1
        ranked.append((seen[sample.task], sample))
    return [sample for _, sample in sorted(ranked, key=lambda entry: entry[0])[:MOST_SAMPLES]]


def _shown(sample: Sample) -> ShownSample:
    first = " ".join(part["text"] for part in _parts(sample) if part["type"] == "text")
    questions = (first, *(turn.question for turn in sample.followups))
    pictures = list(_images(sample))[:MOST_PICTURES]
    return ShownSample(
        tuple(text[-MOST_TEXT:] for text in questions),
        tuple(_small(part, sample.id) for part in pictures),
    )


def _parts(sample: Sample) -> Iterator[Mapping[str, Any]]:
    for message in sample.messages:
        if message["role"] != "user":
            continue
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def _images(sample: Sample) -> Iterator[Mapping[str, Any]]:
    for part in _parts(sample):
        if part["type"] == "image":
            yield part
        elif part["type"] == "video":
            yield from frames_of(part)


def _small(part: Mapping[str, Any], name: str) -> str:
    image = decode(part["path"] if "path" in part else part["image"], name)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _checked(entry: Any) -> ShownSample:
    questions, pictures = entry["questions"], entry["pictures"]
    if not all(isinstance(text, str) for text in [*questions, *pictures]):
        raise TypeError("expected texts")
    for picture in pictures:
        try:
            check_header(io.BytesIO(base64.b64decode(picture, validate=True)), FILE)
        except binascii.Error as error:
            raise ValueError(f"a picture is no base64: {error}") from None
    return ShownSample(tuple(questions), tuple(pictures))
