"""Messages in the chat format of transformers: their parts, and where context ends up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hkvprof.errors import SampleError

Conversation = Sequence[Mapping[str, Any]]
Video = tuple[Sequence[Any], float]
"""PIL images, and how many of them there are per second."""


def parts_of(content: Any) -> list[Mapping[str, Any]]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def flatten(content: Any) -> str:
    """A text-only message: its parts joined by a blank line. Raises SampleError for others."""
    parts = parts_of(content)
    kinds = sorted({part["type"] for part in parts} - {"text"})
    if kinds:
        raise SampleError(
            f"the sample holds a part of type {kinds[0]!r}, but the model is text-only: use "
            "another model or data set"
        )
    return "\n\n".join(part["text"] for part in parts)


def images_of(conversation: Conversation) -> list[Any]:
    """The images in order; each part holds an opened PIL image under `image`."""
    return [part["image"] for part in _parts_of_type(conversation, "image")]


def videos_of(conversation: Conversation) -> list[Video]:
    """The videos in order; each part holds opened PIL images under `frames`, and `fps`.

    Raises SampleError for a video that is not given as frames.
    """
    parts = _parts_of_type(conversation, "video")
    if any(not part.get("frames") or not part.get("fps", 0) > 0 for part in parts):
        raise SampleError(
            'a video must be given as its frames: {"type": "video", "frames": [IMAGE, ...], '
            '"fps": FRAMES_PER_SECOND}'
        )
    return [(part["frames"], float(part["fps"])) for part in parts]


def _parts_of_type(conversation: Conversation, kind: str) -> list[Mapping[str, Any]]:
    parts = (part for message in conversation for part in parts_of(message["content"]))
    return [part for part in parts if part["type"] == kind]


def context_ranges(text: str, conversation: Conversation) -> list[tuple[int, int]]:
    """Character ranges in the rendered text of the parts marked as context.

    Raises SampleError if the chat template did not keep one of them as written.
    """
    ranges, at = [], 0
    for part in _text_parts([conversation]):
        written = part["text"].strip()
        begin = text.find(written, at)
        if part.get("modality") == "context":
            if begin < 0:
                raise SampleError("the chat template changed a context part: it cannot be located")
            ranges.append((begin, begin + len(written)))
        if begin >= 0:
            at = begin + len(written)
    return ranges


def refuse_context(conversations: Sequence[Conversation]) -> None:
    """Raise SampleError if a part is marked as context."""
    if any(part.get("modality") == "context" for part in _text_parts(conversations)):
        raise SampleError(
            '"modality": "context" is for text-only models: remove it from this sample'
        )


def refuse_placeholder(conversations: Sequence[Conversation], placeholder: str | None) -> None:
    """Raise SampleError if a text part contains the token that stands for an image or video."""
    if placeholder and any(placeholder in part["text"] for part in _text_parts(conversations)):
        raise SampleError(
            f"the text contains {placeholder}, which the model takes for an image or video: remove "
            "it"
        )


def _text_parts(conversations: Sequence[Conversation]) -> list[Mapping[str, Any]]:
    return [
        part
        for conversation in conversations
        for message in conversation
        for part in parts_of(message["content"])
        if part["type"] == "text"
    ]
