"""From chat messages to model inputs: the interface of all processors, and the one for text.

Processors of vision models are in models.vision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.errors import ModelError, SampleError
from hkvprof.heads import Modality
from hkvprof.models.conversation import Conversation, context_ranges, flatten

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
