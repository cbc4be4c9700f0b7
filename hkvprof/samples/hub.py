"""Samples from Hugging Face datasets: by id, or a folder that `save_to_disk` made.

`datasets` is imported lazily. Columns are described in docs/sample-format.md.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.lazy import require_extra
from hkvprof.samples.images import check_header, inside, read_limited
from hkvprof.samples.parse import parse_record
from hkvprof.samples.record import Sample

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+){0,2}")
PREFIX = "hf:"
"""What says that a dataset of the hub is meant, whatever lies here."""
_FILES = (".jsonl", ".json")


EXPECTED = (
    "expected a folder with samples.jsonl, a .jsonl file, another layout of docs/calibration.md, "
    "or a dataset of the hub as owner/name or hf:NAME (docs/sample-format.md)"
)


@dataclass(frozen=True)
class HubSource:
    """`owner/name`, `owner/name:split` or `owner/name:config:split`, each perhaps after `hf:`."""

    name: str
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSource | None:
        """The source that `text` names; None unless it begins with `hf:`, or is an owner and a
        name and no path here: not a file's name, and there is no folder called like the owner."""
        told = text.startswith(PREFIX)
        if not _ID.fullmatch(text.removeprefix(PREFIX)):
            return None
        name, *rest = text.removeprefix(PREFIX).split(":")
        owner, slash, _ = name.partition("/")
        if not told and (not slash or Path(text).suffix in _FILES or Path(owner).exists()):
            return None
        return cls(name, *rest) if len(rest) == 2 else cls(name, split=rest[0] if rest else None)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was made by `datasets`' `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(folder: Path) -> Any:
    """The dataset in a `save_to_disk` folder. Raises SampleError."""
    datasets = require_extra("datasets", "datasets")
    try:
        return one_split(datasets.load_from_disk(str(folder)), None)
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # datasets raises nearly anything on damaged folders
        raise SampleError(f"{folder} is not a readable saved dataset ({_line(error)})") from error


def open_hub(source: HubSource) -> Any:
    """The dataset behind a hub id. Raises SampleError when it cannot be had."""
    datasets = require_extra("datasets", "datasets")
    try:
        return one_split(
            datasets.load_dataset(source.name, source.config, trust_remote_code=False), source.split
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SampleError(
            f"the dataset {source.name!r} cannot be had from the hub or its cache "
            f"({_line(error)}), and no such folder or file is here: {EXPECTED}"
        ) from error


def caches() -> tuple[Path, ...]:
    """Where `datasets` keeps the files of what it has downloaded."""
    from huggingface_hub import constants

    config = require_extra("datasets.config", "datasets")
    return Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)


def one_split(dataset: Any, wanted: str | None) -> Any:
    """The wanted split; without a wish `train`, else the first."""
    if not hasattr(dataset, "keys"):
        return dataset
    names = list(dataset.keys())
    name = wanted or ("train" if "train" in names else names[0])
    if name not in names:
        raise UsageError(f"the dataset has no split {name!r}: expected one of {', '.join(names)}")
    return dataset[name]


def tasks_and_ids(dataset: Any, name: str) -> list[tuple[str, str]]:
    """Task and id of every row, without decoding an image."""
    columns, count = dataset.column_names, len(dataset)
    default = name.rsplit("/", 1)[-1]
    tasks = dataset["task"] if "task" in columns else [default] * count
    ids = dataset["id"] if "id" in columns else [f"{default}-{row:06d}" for row in range(count)]
    return [(str(task), str(id_)) for task, id_ in zip(tasks, ids, strict=True)]


def rows(
    dataset: Any, names: list[tuple[str, str]], chosen: list[int], roots: tuple[Path, ...]
) -> Iterator[tuple[str, Callable[[], Sample]]]:
    """For every chosen row: where it stands, and a function that makes its sample.

    Image files outside the bytes of a row must lie below one of `roots`.
    """
    columns = set(dataset.column_names)
    if "messages" not in columns and "question" not in columns:
        raise SampleError(
            f"the dataset has the columns {', '.join(sorted(columns))}: expected 'messages', or "
            "'question' with 'image' or 'images' (docs/sample-format.md), or those of another "
            "layout (docs/calibration.md), which --data-format may name"
        )
    plain = without_decoding(dataset)
    for row in chosen:
        yield f"row {row}", partial(_sample, plain, row, *names[row], roots)


def without_decoding(dataset: Any) -> Any:
    """The dataset with image columns as bytes."""
    Image = require_extra("datasets", "datasets").Image
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, type(feature)(Image(decode=False)))
    return dataset


def _sample(dataset: Any, number: int, task: str, id_: str, roots: tuple[Path, ...]) -> Sample:
    row = dataset[number]
    encoded = _images(row, roots)
    images = iter(encoded)
    messages = row.get("messages") or [
        {"role": "user", "content": [{"type": "image"}] * len(encoded) + [_question(row)]}
    ]
    record: dict[str, Any] = {"id": id_, "task": task}
    record["messages"] = [_message(message, images) for message in messages]
    if next(images, None) is not None:
        raise SampleError("field 'images': more images than places for them in 'messages'")
    reply = row.get("reply", row.get("answer"))
    record["reply"] = reply[0] if isinstance(reply, list) and reply else reply
    last = record["messages"][-1]
    if last["role"] == "assistant" and len(record["messages"]) > 1:
        record["reply"] = record["reply"] or _plain_text(record["messages"].pop())
    if row.get("followups"):
        record["followups"] = row["followups"]
    return parse_record(record, _no_paths)


def _images(row: dict[str, Any], roots: tuple[Path, ...]) -> list[bytes]:
    """The encoded images of a row, headers checked."""
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    encoded = []
    for number, image in enumerate(images):
        data = image.get("bytes") if isinstance(image, dict) else None
        if data is None and isinstance(image, dict) and image.get("path"):
            data = _file(image["path"], roots)
        if not isinstance(data, bytes):
            raise SampleError(f"field 'images[{number}]': expected an image column")
        check_header(io.BytesIO(data), f"images[{number}]")
        encoded.append(data)
    return encoded


def _file(written: str, roots: tuple[Path, ...]) -> bytes:
    """The image file that a row names. Raises SampleError unless it lies below one of `roots`."""
    for root in roots:
        try:
            return read_limited(inside(root, written))
        except (SampleError, OSError):
            continue
    raise SampleError(
        f"{written[:200]!r} is no image file of this dataset: expected images with their bytes in "
        "the dataset itself"
    )


def _question(row: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": row.get("question")}


def _message(message: Any, images: Iterator[bytes]) -> dict[str, Any]:
    """A message without the None values that Arrow fills in, images in their places."""
    if not isinstance(message, dict):
        raise SampleError("field 'messages': expected a list of objects with role and content")
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part, images) for part in content]
    return {"role": message.get("role"), "content": content}


def _part(part: Any, images: Iterator[bytes]) -> Any:
    if not isinstance(part, dict):
        return part
    known = {key: value for key, value in part.items() if value is not None}
    if known.get("type") == "image":
        data = next(images, None)
        if data is None:
            raise SampleError("field 'images': fewer images than places for them in 'messages'")
        return {"type": "image", "image": data}
    return known


def _plain_text(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def _no_paths(path: str) -> str:
    raise SampleError(f"{path}: images of a dataset belong into its 'image' or 'images' column")


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
