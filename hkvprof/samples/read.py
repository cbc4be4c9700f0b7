"""Calibration and evaluation samples: the records, and the readers of what users have on disk.

The format is documented in docs/sample-format.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import hub as sample_hub
from hkvprof.samples import images
from hkvprof.samples.parse import parse_line
from hkvprof.samples.record import Message, Sample, Turn, frames_of

__all__ = [
    "LoadedSamples",
    "Message",
    "Sample",
    "Turn",
    "load_samples",
    "open_images",
    "samples_digest",
]

MAX_LINE_BYTES = 16 * 2**20
FILE_NAME = "samples.jsonl"

OnError = Literal["raise", "skip"]
_Entry = tuple[str, Callable[[], Sample]]
"""Where a sample stands (`samples.jsonl:17`), and a function that reads and checks it."""


@dataclass(frozen=True)
class LoadedSamples:
    """What `load_samples` read.

    `skipped` holds the reason of every bad sample left out; `digest` is the SHA-256 of the chosen
    samples' text and images, whatever their order and the names of the image files.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]
    digest: str

    @property
    def tasks(self) -> dict[str, int]:
        """Number of samples per task, tasks sorted by name."""
        names = [sample.task for sample in self.samples]
        return {name: names.count(name) for name in sorted(set(names))}


def load_samples(
    source: str | Path,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
) -> LoadedSamples:
    """Read samples from a folder with samples.jsonl, a .jsonl file, or a Hugging Face dataset.

    What is here comes first; the hub is asked for `hf:NAME` and for `owner/name` alone (`on_hub`).
    Images are checked (present, inside the folder, readable header, at most 36 megapixels) but not
    decoded; see `open_images`. `max_samples` picks a subset balanced over tasks that depends on
    `seed`, tasks and ids alone, not on the order of lines. `on_error="skip"` leaves bad samples
    out and reports them. Raises SampleError naming file, line and field; UsageError.
    """
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"max_samples is {max_samples}: expected at least 1")
    entries = _entries(str(source), max_samples, seed)
    samples, skipped = _read(entries, on_error)
    if not samples:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise SampleError(f"{source} holds no usable sample ({len(skipped)} skipped{first})")
    if max_samples is not None:
        chosen = choose([(s.task, s.id) for s in samples], max_samples, seed)
        samples = [samples[i] for i in chosen]
    return LoadedSamples(tuple(samples), tuple(skipped), samples_digest(samples))


def open_images(sample: Sample) -> tuple[Message, ...]:
    """The sample's messages with every image part holding a decoded RGB PIL image under `image`,
    and every video part such images under `frames`.

    Raises SampleError naming file and sample.
    """
    return tuple(
        {**message, "content": [_opened(sample.id, part) for part in message["content"]]}
        if not isinstance(message["content"], str)
        else message
        for message in sample.messages
    )


def _opened(sample_id: str, part: Message) -> Message:
    if part["type"] == "video":
        frames = [_opened(sample_id, frame)["image"] for frame in frames_of(part)]
        return {**part, "frames": frames}
    if part["type"] != "image":
        return part
    source = part["path"] if "path" in part else part["image"]
    name = str(part.get("path", "in memory"))
    try:
        return {"type": "image", "image": images.decode(source, name)}
    except SampleError as error:
        raise SampleError(f"sample {sample_id!r}: {error}") from None


def choose(names: Sequence[tuple[str, str]], count: int, seed: int) -> list[int]:
    """Positions of `count` of the (task, id) pairs, balanced over tasks, ascending.

    Every task's ids are ordered by a hash of seed, task and id, and tasks take turns.
    """
    by_task: dict[str, list[int]] = {}
    ranked = sorted(range(len(names)), key=lambda i: _rank(seed, *names[i]))
    for position in ranked:
        by_task.setdefault(names[position][0], []).append(position)
    tasks = sorted(by_task, key=lambda task: _rank(seed, task))
    turns = zip_longest(*(by_task[task] for task in tasks))
    taken = [position for turn in turns for position in turn if position is not None]
    return sorted(taken[:count])


def _rank(seed: int, *names: str) -> str:
    text = json.dumps([seed, *names])
    return hashlib.sha256(text.encode("utf-8")).hexdigest() + text


def _entries(source: str, max_samples: int | None, seed: int) -> Iterator[_Entry]:
    if (hub := on_hub(source)) is not None:
        dataset = sample_hub.open_hub(hub)
        return _dataset_rows(dataset, hub.name, sample_hub.caches(), max_samples, seed)
    path = _path(source)
    if path.is_dir() and (path / FILE_NAME).is_file():
        images.inside(path, FILE_NAME)
        return _lines(path / FILE_NAME)
    if path.is_dir() and sample_hub.is_saved_dataset(path):
        dataset = sample_hub.open_saved(path)
        return _dataset_rows(dataset, path.name, (path,), max_samples, seed)
    if path.is_dir():
        raise UsageError(f"the folder {source} holds no {FILE_NAME} (docs/sample-format.md)")
    if path.is_file():
        return _lines(path)
    raise UsageError(f"no such folder or file: {source}; {sample_hub.EXPECTED}")


def on_hub(source: str) -> sample_hub.HubSource | None:
    """The dataset of the hub that `source` means; None for what is here, or can only be here."""
    told = source.startswith(sample_hub.PREFIX)
    return sample_hub.HubSource.parse(source) if told or not _path(source).exists() else None


def _path(source: str) -> Path:
    path = Path(source).expanduser()
    try:
        path.exists()
    except (OSError, ValueError):  # a part of the name is too long, NUL
        raise UsageError(f"{source[:80]!r} is no path and no dataset id") from None
    return path


def _dataset_rows(
    dataset: Any, name: str, roots: tuple[Path, ...], limit: int | None, seed: int
) -> Iterator[_Entry]:
    """Rows of a dataset; a subset is chosen first, so that no other row is read.

    Image files that rows name must lie below one of `roots`.
    """
    names = sample_hub.tasks_and_ids(dataset, name)
    chosen = list(range(len(names))) if limit is None else choose(names, limit, seed)
    for where, make in sample_hub.rows(dataset, names, chosen, roots):
        yield f"{name}: {where}", make


def _lines(path: Path) -> Iterator[_Entry]:
    """Every line that is not blank, each at most MAX_LINE_BYTES long."""
    find = partial(images.find_image, path.parent)
    try:
        with path.open("rb") as stream:
            for number in range(1, 2**31):
                line = stream.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    raise SampleError(
                        f"{path}:{number}: the line has over {MAX_LINE_BYTES:,} bytes: expected "
                        "one JSON object per line"
                    )
                if line.strip():
                    yield f"{path}:{number}", partial(_parse_bytes, line, number, find)
    except OSError as error:
        raise SampleError(f"cannot read {path}: {error.strerror or error}") from None


def _parse_bytes(line: bytes, number: int, find: Callable[[str], str]) -> Sample:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"expected UTF-8, found other bytes at byte {error.start + 1}") from None
    return parse_line(text, find)


def _read(entries: Iterable[_Entry], on_error: OnError) -> tuple[list[Sample], list[str]]:
    samples: list[Sample] = []
    skipped: list[str] = []
    seen: dict[str, str] = {}
    for where, make in entries:
        try:
            sample = make()
            if sample.id in seen:
                raise SampleError(f"field 'id': {sample.id!r} occurs already at {seen[sample.id]}")
        except SampleError as error:
            message = f"{where}: {error}"
            if on_error == "raise":
                raise SampleError(f"{message}; `--on-error skip` leaves such samples out") from None
            skipped.append(message)
            continue
        seen[sample.id] = where
        samples.append(sample)
    return samples, skipped


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
    if part["type"] == "video":
        frames = [_hashable_part(frame) for frame in frames_of(part)]
        return {"type": "video", "frames": frames, "fps": part["fps"]}
    if part["type"] == "image":
        return {"type": "image", "sha256": hashlib.sha256(images.image_bytes(part)).hexdigest()}
    return dict(part)
