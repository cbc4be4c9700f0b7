"""From chat messages to model inputs: messages, the interface of all processors, the one for text.

Messages are in the chat format of transformers. Processors of vision models are in models.vision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.errors import ModelError, SampleError
from hkvprof.heads import Modality

Conversation = Sequence[Mapping[str, Any]]
Video = tuple[Sequence[Any], float]
"""PIL images, and how many of them there are per second."""
_SECONDS = "second_per_grid_ts"


@dataclass(frozen=True)
class Encoded:
    """Model inputs of a left-padded batch, and what every position holds (Modality values)."""

    inputs: dict[str, Tensor]
    modality: Int[Tensor, "batch tokens"]

    @property
    def tokens(self) -> int:
        """Length of the longest prompt."""
        return int(self.inputs["input_ids"].shape[1])

    def to(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs on a device, floating-point ones in the model's dtype, but not seconds: M-RoPE
        rounds them to whole positions."""
        return {
            key: value.to(device, dtype)
            if value.is_floating_point() and key != _SECONDS
            else value.to(device)
            for key, value in self.inputs.items()
        }


class ChatProcessor(ABC):
    """Encodes conversations in the chat format of transformers; decodes replies."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
            raise ModelError(  # transformers makes an empty tokenizer where the files are missing
                "the checkpoint's tokenizer turns text into nothing: expected tokenizer.json (or "
                "the files of its tokenizer class) beside the weights"
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.config = config

    @abstractmethod
    def render(self, conversation: Conversation, *, reply_next: bool) -> str:
        """The conversation through the chat template; `reply_next` opens the assistant's turn."""

    @abstractmethod
    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Inputs for the assistant's reply to every conversation, left padded."""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of already rendered text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The reply as text, special tokens removed."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


class TextProcessor(ChatProcessor):
    """For text-only models; parts of a message are joined by a blank line."""

    def render(self, conversation: Conversation, *, reply_next: bool) -> str:
        """See ChatProcessor."""
        flat = [{"role": m["role"], "content": flatten(m["content"])} for m in conversation]
        return apply_template(self.tokenizer, flat, reply_next)

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """See ChatProcessor. Parts marked `"modality": "context"` are labelled CONTEXT."""
        texts = [self.render(conversation, reply_next=True) for conversation in conversations]
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        modality = torch.zeros_like(batch["input_ids"])
        for row, conversation in enumerate(conversations):
            starts, ends = batch["offset_mapping"][row].unbind(-1)
            for begin, end in context_ranges(texts[row], conversation):
                modality[row][(starts < end) & (ends > begin)] = Modality.CONTEXT
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return Encoded(inputs, modality)


def apply_template(renderer: Any, messages: list[dict[str, Any]], reply_next: bool) -> str:
    """Messages through the chat template of `renderer`, a processor or tokenizer.

    Raises ModelError where it has none, SampleError where it refuses the messages.
    """
    from jinja2 import TemplateError

    if not renderer.chat_template:
        raise ModelError(
            "the model has no chat template: use an instruction-tuned model, or set "
            "processor.tokenizer.chat_template"
        )
    try:
        return str(
            renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_next)
        )
    except TemplateError as error:
        raise SampleError(f"the model's chat template refuses the messages: {error}") from error


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
