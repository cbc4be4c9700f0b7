"""Calibration and evaluation samples: the records, and the readers of what users have on disk.

The format is documented in docs/sample-format.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import hub as sample_hub
from hkvprof.samples import images, recommended, videos
from hkvprof.samples.digest import samples_digest
from hkvprof.samples.layouts import places
from hkvprof.samples.layouts import recognise as layouts
from hkvprof.samples.layouts.opened import NATIVE, Opened, Recognised
from hkvprof.samples.layouts.recognise import Reading
from hkvprof.samples.layouts.tables import DatasetTable, ListTable
from hkvprof.samples.parse import parse_line
from hkvprof.samples.record import Message, Sample, Turn, frames_of
from hkvprof.samples.subset import choose

__all__ = [
    "LoadedSamples",
    "Message",
    "Reading",
    "Sample",
    "Turn",
    "choose",
    "load_samples",
    "open_images",
    "samples_digest",
]

MAX_LINE_BYTES = 16 * 2**20
FILE_NAME = "samples.jsonl"

OnError = Literal["raise", "skip"]
Source = str | Path | Any
"""A path, a dataset's name, a `datasets.Dataset` or a list of rows."""
_Entry = tuple[str, Callable[[], Sample]]
"""Where a sample stands (`samples.jsonl:17`), and a function that reads and checks it."""
_Found = tuple[Recognised, Iterator[_Entry]]
NATIVE_LAYOUT = Recognised()


@dataclass(frozen=True)
class _Subset:
    """How many rows are taken (None: all), and the seed that chooses them."""

    count: int | None
    seed: int

    def of(self, names: Sequence[tuple[str, str]]) -> list[int]:
        if self.count is None:
            return list(range(len(names)))
        return choose(names, self.count, self.seed)


@dataclass(frozen=True)
class LoadedSamples:
    """What `load_samples` read.

    `skipped` holds the reason of every bad sample left out; `digest` is the SHA-256 of the chosen
    samples' text and images, whatever their order and the names of the image files; `recognised`
    says which layout the source has.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]
    digest: str
    recognised: Recognised = NATIVE_LAYOUT

    @property
    def tasks(self) -> dict[str, int]:
        """Number of samples per task, tasks sorted by name."""
        names = [sample.task for sample in self.samples]
        return {name: names.count(name) for name in sorted(set(names))}


def load_samples(
    source: Source,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    on_error: OnError = "raise",
    reading: Reading | None = None,
) -> LoadedSamples:
    """Read samples from a folder with samples.jsonl, a .jsonl file, a dataset of Hugging Face, or
    any other of the layouts in docs/calibration.md; `reading` says what its looks do not.

    What is here comes first; the hub is asked for `hf:NAME`, for `owner/name` (`on_hub`) and for
    `recommended:KIND` (samples.recommended) alone.
    Images are checked (present, inside the folder, readable header, at most 36 megapixels) but not
    decoded; see `open_images`. `max_samples` picks a subset balanced over tasks that depends on
    `seed`, tasks and ids alone, not on the order of lines. `on_error="skip"` leaves bad samples
    out and reports them. Raises SampleError naming file, line and field; UsageError.
    """
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"max_samples is {max_samples}: expected at least 1")
    reading = reading or Reading()
    reading.check()
    recognised, entries = _entries(source, reading, _Subset(max_samples, seed))
    samples, skipped = _read(entries, on_error)
    if not samples:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise SampleError(
            f"{_called(source)} holds no usable sample ({len(skipped)} skipped{first})"
        )
    if max_samples is not None:
        chosen = choose([(s.task, s.id) for s in samples], max_samples, seed)
        samples = [samples[i] for i in chosen]
    digest = samples_digest(samples)
    return LoadedSamples(tuple(samples), tuple(skipped), digest, recognised)


def _called(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


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
    if part["type"] == "video" and "path" in part:
        try:
            frames, rate = videos.decode_video(part["path"], part["fps"])
        except SampleError as error:
            raise SampleError(f"sample {sample_id!r}: {error}") from None
        return {"type": "video", "frames": frames, "fps": rate}
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


def _entries(source: Source, reading: Reading, subset: _Subset) -> _Found:
    """What the source is recognised as, and its entries."""
    if not isinstance(source, str | Path):
        return _in_memory(source, reading, subset)
    source = str(source)
    if (kinds := recommended.kinds_of(source)) is not None:
        return _recommended(kinds, reading, subset)
    if (hub := on_hub(source)) is not None:
        return _dataset(sample_hub.open_hub(hub), hub.name, sample_hub.caches(), reading, subset)
    path = _path(source)
    if path.is_dir() and (path / FILE_NAME).is_file() and reading.layout in (None, NATIVE):
        images.inside(path, FILE_NAME)
        return _native(path / FILE_NAME, reading)
    if path.is_dir() and sample_hub.is_saved_dataset(path):
        return _dataset(sample_hub.open_saved(path), path.name, (path,), reading, subset)
    if path.is_dir():
        return _rows(places.open_folder(path, reading), subset)
    if path.is_file():
        opened = places.open_file(path, reading)
        return _native(path, reading) if opened is None else _rows(opened, subset)
    raise UsageError(f"no such folder or file: {source}; {sample_hub.EXPECTED}")


def _native(path: Path, reading: Reading) -> _Found:
    reading.refuse_unused("samples.jsonl")
    if reading.image_folder is not None:
        raise UsageError("--image-folder: the images of samples.jsonl lie beside it")
    return NATIVE_LAYOUT, _lines(path)


def _rows(opened: Opened, subset: _Subset) -> _Found:
    """Rows of a table; a subset is chosen first, so that no picture of another row is read."""
    names = opened.names()
    return opened.recognised, opened.entries(names, subset.of(names))


def _recommended(kinds: Sequence[str], reading: Reading, subset: _Subset) -> _Found:
    """Samples of several tables, as many of each task as there are; the subset is chosen first."""
    reading.refuse_unused("public sets with questions")
    tables = recommended.open_recommended(kinds)
    named = [(table, name, row) for table in tables for row, name in enumerate(table.names())]
    subset = replace(subset, count=subset.count or recommended.DEFAULT_SAMPLES)
    chosen = [named[i] for i in subset.of([name for _, name, _ in named])]
    notes = tuple(note for table in tables for note in table.notes)

    def entries() -> Iterator[_Entry]:
        for table in tables:
            rows = {row: name for own, name, row in chosen if own is table}
            names = [rows.get(row, ("", "")) for row in range(len(table.table))]
            yield from table.entries(names, sorted(rows))

    return Recognised(notes=notes), entries()


def _in_memory(source: Any, reading: Reading, subset: _Subset) -> _Found:
    """A dataset of `datasets`, one split of several, or a list of rows."""
    if isinstance(source, list | tuple):
        return _rows(layouts.opened(ListTable("samples", source), reading), subset)
    dataset = sample_hub.one_split(source, None)
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"samples of type {type(source).__name__} are not taken: expected a path, a list of "
            "objects or a datasets.Dataset (of a streamed one: list(dataset.take(128)))"
        )
    return _dataset(dataset, "samples", (), reading, subset)


def _dataset(
    dataset: Any, name: str, roots: tuple[Path, ...], reading: Reading, subset: _Subset
) -> _Found:
    """Rows of a dataset; image files that they name must lie below one of `roots`."""
    plain = sample_hub.without_decoding(dataset)
    columns = frozenset(dataset.column_names)
    own = layouts.is_native_dataset(columns, plain[0] if len(plain) else {})
    if reading.layout == NATIVE or (reading.layout is None and own):
        reading.refuse_unused("a dataset with questions")
        return NATIVE_LAYOUT, _dataset_rows(dataset, name, roots, subset)
    return _rows(layouts.opened(DatasetTable(name, plain), reading, *roots), subset)


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
    dataset: Any, name: str, roots: tuple[Path, ...], subset: _Subset
) -> Iterator[_Entry]:
    """Rows of a dataset; a subset is chosen first, so that no other row is read.

    Image files that rows name must lie below one of `roots`.
    """
    names = sample_hub.tasks_and_ids(dataset, name)
    for where, make in sample_hub.rows(dataset, names, subset.of(names), roots):
        yield f"{name}: {where}", make


def _lines(path: Path) -> Iterator[_Entry]:
    """Every line that is not blank, each at most MAX_LINE_BYTES long."""
    find = _Finder(path.parent)
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


@dataclass(frozen=True)
class _Finder:
    """Finds what lines name, below the folder of their file."""

    root: Path

    def image(self, written: str) -> str:
        return images.find_image(self.root, written)

    def video(self, written: str, fps: float) -> dict[str, Any]:
        return videos.find_video(self.root, written, fps)


def _parse_bytes(line: bytes, number: int, find: _Finder) -> Sample:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"expected UTF-8, found other bytes at byte {error.start + 1}") from None
    return parse_line(text, find.image, find.video)


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
