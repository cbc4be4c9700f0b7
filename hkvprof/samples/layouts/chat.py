"""`messages`: chats of OpenAI's API, of qwen-vl-utils, and of those who follow them.

Published: platform.openai.com/docs/guides/vision (content parts `text` and `image_url`, an
address, file or `data:` URL), github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils (`image`, and
address, file or `data:` URL), github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils (`image`, and
`video` as a list of frames), huggingface.co/docs/transformers/chat_templating_multimodal (`image`
with `path`, `url`, `base64`), LLaMA-Factory's data/README.md (strings with `<image>`, `images`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkvprof.errors import SampleError
from hkvprof.samples.layouts.conversations import needed_in
from hkvprof.samples.layouts.drafts import (
    PLACE,
    Draft,
    Row,
    RowLayout,
    conversation,
    needed,
    text,
    with_places,
)
from hkvprof.samples.layouts.media import Media, film
from hkvprof.samples.layouts.pictures import Part, Pictures, wrong
from hkvprof.samples.parse import MAX_PARTS

_ROLES = {"developer": "system"}
_PICTURES = ("image", "image_url", "input_image")
_TEXTS = ("text", "input_text", "output_text")


def has_foreign_parts(row: Row) -> bool:
    """Whether the messages hold parts that samples.jsonl does not know, such as `image_url`."""
    messages = row.get("messages")
    parts = [
        part
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict)
    ]
    return any(
        part.get("type") in ("image_url", "input_image", "input_text")
        or "image" in part
        or "video" in part
        for part in parts
    )


def has_places(row: Row) -> bool:
    """Whether the messages are strings that show with `<image>` where pictures go."""
    messages = row.get("messages")
    contents = [
        message.get("content")
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict)
    ]
    return any(isinstance(content, str) and PLACE.search(content) for content in contents)


def _build(row: Row, pictures: Pictures) -> Draft:
    own = {key: row[key] for key in ("reply", "followups") if row.get(key) is not None}
    return {**_chat(row, pictures), **own}


def _chat(row: Row, pictures: Pictures) -> Draft:
    field, messages = needed(row, "messages")
    if not isinstance(messages, list) or not messages:
        raise wrong(field, "a list of messages with 'role' and 'content'", messages)
    media = Media.of(row, pictures)
    if has_places(row):
        said = [_said(message, f"{field}[{i}]") for i, message in enumerate(messages)]
        return with_places(said, media, field)
    _check_count(messages, field)
    reader = _Parts(media)
    made = [reader.message(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    for name, _ in (*media.images, *media.films):
        raise SampleError(f"field '{name}': more pictures than places for them in '{field}'")
    return conversation(made, field)


def _said(message: object, field: str) -> tuple[str, str]:
    role, content = _fields(message, field)
    return role, text(content, f"{field}.content")


def _fields(message: object, field: str) -> tuple[str, Any]:
    """Role and content of a message. Raises SampleError for one that calls a tool."""
    if not isinstance(message, Mapping):
        raise wrong(field, "an object with 'role' and 'content'", message)
    for call in ("tool_calls", "function_call"):
        if message.get(call):
            raise SampleError(f"field '{field}.{call}': calls of tools are not taken")
    role = text(needed_in(message, field, "role")[1], f"{field}.role")
    return _ROLES.get(role, role), needed_in(message, field, "content")[1]


def _check_count(messages: list[Any], field: str) -> None:
    """Before a picture is opened: there may be a million of them."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    films = [part.get("video") for part in parts if isinstance(part, Mapping)]
    count = len(parts) + sum(len(film) for film in films if isinstance(film, list))
    if count > MAX_PARTS:
        raise wrong(field, f"at most {MAX_PARTS} parts and frames in all", f"{count}")


class _Parts:
    """Reads content parts; those that only say "image" take the next of the row's pictures."""

    def __init__(self, media: Media) -> None:
        self.media = media

    def message(self, message: object, field: str) -> dict[str, Any]:
        role, content = _fields(message, field)
        if isinstance(content, list):
            content = [self._part(p, f"{field}.content[{i}]") for i, p in enumerate(content)]
            return {"role": role, "content": content or ""}
        return {"role": role, "content": text(content, f"{field}.content")}

    def _part(self, part: object, field: str) -> Part:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise wrong(field, "a part of a message", part)
        known = {key: value for key, value in part.items() if value is not None}
        kind = known.get("type") or next(
            (k for k in (*_PICTURES, "video", "text") if k in known), ""
        )
        if kind in _TEXTS:
            return _text_part(known, field)
        if kind in _PICTURES:
            return self._picture(known, field)
        if kind == "video":
            return self._video(known, field)
        raise wrong(f"{field}.type", "text, image, image_url or video", kind or dict(part))

    def _picture(self, part: Mapping[str, Any], field: str) -> Part:
        for key in ("image", "image_url", "path", "url", "base64"):
            if key in part:
                value = part[key]
                if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
                    value = f"data:;base64,{value}"
                nested = ".url" if isinstance(value, Mapping) and "url" in value else ""
                return self.media.pictures.part(value, f"{field}.{key}{nested}")
        if not self.media.images:
            raise SampleError(f"field '{field}': no picture is given, here or in 'images'")
        return self.media.take("image")

    def _video(self, part: Mapping[str, Any], field: str) -> Part:
        rate = part.get("fps", part.get("sample_fps"))
        for key in ("video", "frames", "path", "url"):
            if key in part:
                return film(part[key], f"{field}.{key}", self.media.pictures, rate)
        if not self.media.films:
            raise SampleError(f"field '{field}': no video is given, here or in 'videos'")
        return self.media.take("video")


def _text_part(part: Mapping[str, Any], field: str) -> Part:
    kept = {"type": "text", "text": text(part.get("text"), f"{field}.text")}
    return {**kept, "modality": part["modality"]} if "modality" in part else kept


CHAT = RowLayout(
    name="chat",
    title="chat messages (OpenAI, qwen-vl-utils)",
    source="https://platform.openai.com/docs/guides/vision",
    fits=lambda columns: "messages" in columns,
    build=_build,
    fields=(
        ("messages", "messages; the last one of the assistant becomes the reply"),
        ("reply", "reply"),
        ("followups", "followups"),
        ("image", "picture in its place in the messages"),
        ("images", "pictures in their places in the messages"),
    ),
)
