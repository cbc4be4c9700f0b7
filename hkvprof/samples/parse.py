"""From one JSON object to one Sample, strictly: whatever is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.files import strict_json
from hkvprof.samples.record import Sample, Turn
from hkvprof.samples.videos import DEFAULT_FPS, MAX_FPS

MAX_ID_CHARACTERS = 256
MAX_PARTS = 4096
"""Most content parts and frames of all messages of a sample together; most messages; most
followups."""

ImageCheck = Callable[[str], str]
"""Checks an image path as written and returns where the file is. Raises SampleError."""
VideoCheck = Callable[[str, float], dict[str, Any]]
"""Checks the path of a video file or a folder of frames, as written, and returns the part for it at
so many frames per second. Raises SampleError."""


@dataclass(frozen=True)
class _Checks:
    """How paths are checked; without `video`, videos are given as frames."""

    image: ImageCheck
    video: VideoCheck | None


_KEYS = ("id", "task", "messages", "reply", "followups")
_ROLES = ("system", "user", "assistant")


def parse_line(text: str, find_image: ImageCheck, find_video: VideoCheck | None = None) -> Sample:
    """One line of samples.jsonl. Raises SampleError naming the field, or that it is no JSON."""
    try:
        record = strict_json.loads(text)
    except ValueError as error:
        raise SampleError(
            f"expected one JSON object per line, found invalid JSON ({error})"
        ) from None
    return parse_record(record, find_image, find_video)


def parse_record(
    record: object, find_image: ImageCheck, find_video: VideoCheck | None = None
) -> Sample:
    """A Sample from a decoded JSON object. Raises SampleError naming the field.

    Without `find_video`, videos must be given as frames.
    """
    find = _Checks(find_image, find_video)
    fields = _object("sample", record, required=("id", "task", "messages"), allowed=_KEYS)
    messages = _list("messages", fields["messages"], at_least=1)
    _check_parts(messages)
    parsed = tuple(_message(f"messages[{i}]", m, find) for i, m in enumerate(messages))
    if parsed[-1]["role"] != "user":
        raise _wrong(
            f"messages[{len(parsed) - 1}].role",
            "the last message to be the user's (the expected answer belongs into 'reply')",
            parsed[-1]["role"],
        )
    reply = fields.get("reply")
    followups = _list("followups", fields.get("followups") or [], at_least=0)
    return Sample(
        id=_label("id", fields["id"]),
        task=_label("task", fields["task"]),
        messages=parsed,
        reply=None if reply is None else _text("reply", reply),
        followups=tuple(_turn(f"followups[{i}]", turn) for i, turn in enumerate(followups)),
    )


def _check_parts(messages: list[object]) -> None:
    """Before an image is opened: there may be a million of them."""
    contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    frames = [part.get("frames") for part in parts if isinstance(part, Mapping)]
    count = len(parts) + sum(len(given) for given in frames if isinstance(given, list))
    if count > MAX_PARTS:
        raise _wrong("messages", f"at most {MAX_PARTS} parts and frames in all", f"{count}")


def _message(where: str, value: object, find: _Checks) -> dict[str, Any]:
    message = _object(where, value, required=("role", "content"), allowed=("role", "content"))
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
    if isinstance(content, str):
        return {"role": role, "content": _text(f"{where}.content", content)}
    parts = _list(f"{where}.content", content, at_least=1)
    return {
        "role": role,
        "content": [_part(f"{where}.content[{i}]", part, find) for i, part in enumerate(parts)],
    }


def _part(where: str, value: object, find: _Checks) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return _text_part(where, value)
    if kind == "image":
        return _image_part(where, value, find.image)
    if kind == "video":
        return _video_part(where, value, find)
    expected = 'a part of "type" "text", "image" or "video"'
    raise _wrong(where, expected, value if kind is None else kind)


def _text_part(where: str, value: object) -> dict[str, Any]:
    part = _object(where, value, required=("type", "text"), allowed=("type", "text", "modality"))
    text = {"type": "text", "text": _text(f"{where}.text", part["text"])}
    if "modality" not in part:
        return text
    if part["modality"] not in ("text", "context"):
        raise _wrong(f"{where}.modality", "'text' or 'context'", part["modality"])
    return {**text, "modality": part["modality"]}


def _image_part(where: str, value: object, find_image: ImageCheck) -> dict[str, Any]:
    if isinstance(value, Mapping) and isinstance(value.get("image"), bytes):
        part = _object(where, value, required=("type", "image"), allowed=("type", "image"))
        return {"type": "image", "image": part["image"]}
    part = _object(where, value, required=("type", "path"), allowed=("type", "path"))
    return {"type": "image", "path": _image_path(f"{where}.path", part["path"], find_image)}


def _video_part(where: str, value: object, find: _Checks) -> dict[str, Any]:
    given = "path" if isinstance(value, Mapping) and "path" in value else "frames"
    part = _object(where, value, required=("type", given), allowed=("type", given, "fps"))
    rate = part.get("fps", DEFAULT_FPS)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= MAX_FPS:
        raise _wrong(f"{where}.fps", f"a number above 0, at most {MAX_FPS}", rate)
    if given == "path":
        return _film(f"{where}.path", part["path"], float(rate), find.video)
    frames = _list(f"{where}.frames", part["frames"], at_least=1)
    paths = [_image_path(f"{where}.frames[{i}]", f, find.image) for i, f in enumerate(frames)]
    return {"type": "video", "frames": paths, "fps": float(rate)}


def _film(where: str, value: object, rate: float, find: VideoCheck | None) -> dict[str, Any]:
    written = _label(where, value, 4096)
    if find is None:
        raise _wrong(where, "a video as its frames", written)
    try:
        return find(written, rate)
    except SampleError as error:
        raise SampleError(f"field '{where}': {error}") from None


def _image_path(where: str, value: object, find_image: ImageCheck) -> str:
    try:
        return find_image(_label(where, value, 4096))
    except SampleError as error:
        if str(error).startswith("field "):
            raise
        raise SampleError(f"field '{where}': {error}") from None


def _turn(where: str, value: object) -> Turn:
    keys = ("question", "reply")
    turn = _object(where, value, required=keys, allowed=keys)
    return Turn(
        question=_text(f"{where}.question", turn["question"]),
        reply=_text(f"{where}.reply", turn["reply"]),
    )


def _object(
    where: str, value: object, required: tuple[str, ...], allowed: tuple[str, ...]
) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    prefix = "" if where == "sample" else f"{where}."
    for key in required:
        if key not in value:
            raise SampleError(f"field '{prefix}{key}' is missing")
    for key in value:
        if key not in allowed:
            raise SampleError(
                f"field '{prefix}{_short(key)}' is not known: expected only {', '.join(allowed)}"
            )
    return value


def _list(where: str, value: object, at_least: int) -> list[object]:
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    if len(value) < at_least:
        raise _wrong(where, f"at least {at_least} entry", "an empty list")
    if len(value) > MAX_PARTS:
        raise _wrong(where, f"at most {MAX_PARTS} entries", f"{len(value)} entries")
    return value


def _label(where: str, value: object, longest: int = MAX_ID_CHARACTERS) -> str:
    """A short printable string."""
    text = _text(where, value)
    if not text.strip() or len(text) > longest or not text.isprintable():
        raise _wrong(where, f"1 to {longest} printable characters", text)
    return text


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError(f"field '{where}': holds half a character (a lone surrogate)") from None
    return value


def _wrong(where: str, expected: str, found: object) -> SampleError:
    return SampleError(f"field '{where}': expected {expected}, found {_short(found)}")


def _short(value: object) -> str:
    """At most 60 characters of a stranger's value, on one line."""
    text = value if isinstance(value, str) else repr(value)
    line = text.encode("unicode_escape").decode("ascii")
    return line if len(line) <= 60 else f"{line[:57]}..."
