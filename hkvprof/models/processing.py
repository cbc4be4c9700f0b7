"""From chat messages to model inputs, with and without torchvision.

Where torchvision works, transformers' AutoProcessor does everything. Where it does not, images go
through the image processor (Pillow) and the image placeholders are expanded here. Token ids, masks
and grids are equal, pixels up to rounding (1e-6; at most two grey levels where an image is resized;
tests/models/test_processing.py). Text-only models need a tokenizer alone.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.errors import ModelError, SampleError
from hkvprof.heads import Modality
from hkvprof.models.conversation import (
    Conversation,
    context_ranges,
    flatten,
    images_of,
    parts_of,
    refuse_context,
    refuse_placeholder,
)


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
        """The inputs on a device, floating-point ones in the model's dtype."""
        return {
            key: value.to(device, dtype) if value.is_floating_point() else value.to(device)
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
        return _apply_template(self.tokenizer, flat, reply_next)

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


class _VisionProcessor(ChatProcessor):
    """What both vision paths share: rendering, and the modality of every position."""

    renderer: Any

    def render(self, conversation: Conversation, *, reply_next: bool) -> str:
        """See ChatProcessor."""
        listed = [{"role": m["role"], "content": parts_of(m["content"])} for m in conversation]
        return _apply_template(self.renderer, listed, reply_next)

    def _modality(self, ids: Tensor) -> Tensor:
        modality = torch.zeros_like(ids)
        for name, kind in (("image_token_id", Modality.IMAGE), ("video_token_id", Modality.VIDEO)):
            token = getattr(self.config, name, None)
            if token is not None:
                modality[ids == token] = kind
        return modality


class AutoVisionProcessor(_VisionProcessor):
    """transformers' AutoProcessor (needs torchvision)."""

    def __init__(self, processor: Any, config: Any) -> None:
        super().__init__(processor.tokenizer, config)
        self.renderer = self.processor = processor

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """See ChatProcessor."""
        refuse_context(conversations)
        images = [images_of(conversation) for conversation in conversations]
        texts = [self.render(conversation, reply_next=True) for conversation in conversations]
        refuse_placeholder(conversations, getattr(self.processor, "image_token", None))
        begun = texts[0].startswith(self.tokenizer.bos_token or "\0")
        with _bad_image():
            batch = self.processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                add_special_tokens=not begun,
                return_tensors="pt",
            )
        inputs = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        return Encoded(inputs, self._modality(inputs["input_ids"]))


class PillowVisionProcessor(_VisionProcessor):
    """Image processor and tokenizer of the Qwen-VL family, without torchvision (images only)."""

    def __init__(self, image_processor: Any, tokenizer: Any, config: Any) -> None:
        super().__init__(tokenizer, config)
        self.renderer = tokenizer
        self.image_processor = image_processor
        self.placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """See ChatProcessor."""
        refuse_context(conversations)
        texts = [self.render(conversation, reply_next=True) for conversation in conversations]
        images = [image for conversation in conversations for image in images_of(conversation)]
        refuse_placeholder(conversations, self.placeholder)
        inputs: dict[str, Tensor] = {}
        if images:
            with _bad_image():
                vision = self.image_processor(images=images, return_tensors="pt")
            inputs = {key: vision[key] for key in ("pixel_values", "image_grid_thw")}
            texts = self._expand(texts, inputs["image_grid_thw"])
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs |= {key: batch[key] for key in ("input_ids", "attention_mask")}
        modality = self._modality(inputs["input_ids"])
        inputs["mm_token_type_ids"] = modality.to(inputs["input_ids"].dtype)
        return Encoded(inputs, modality)

    def _expand(self, texts: list[str], grids: Int[Tensor, "images 3"]) -> list[str]:
        """Repeat every image placeholder once per merged patch of its image."""
        merge = self.image_processor.merge_size**2
        counts = iter((grids.prod(dim=-1) // merge).tolist())
        expanded = []
        for text in texts:
            head, *rest = text.split(self.placeholder)
            expanded.append(head + "".join(self.placeholder * next(counts) + part for part in rest))
        return expanded


@cache
def torchvision_problem() -> str:
    """Why torchvision cannot be used; empty if it loads beside this torch."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        return "it is not installed" if error.name == "torchvision" else str(error)
    except Exception as error:  # a build for another torch raises nearly anything
        return f"it does not load: {str(error).splitlines()[0]}"
    return ""


def torchvision_works() -> bool:
    """Whether torchvision is installed and loads beside this torch."""
    return not torchvision_problem()


def hide_broken_torchvision() -> None:
    """Let transformers see a torchvision that cannot be imported as one that is not installed.

    transformers looks for the package without importing it; its vision models then die with
    "operator torchvision::nms does not exist". In sys.modules, None is Python's own mark for a
    module that must not be imported.
    """
    from transformers.utils import import_utils

    if torchvision_works() or not import_utils.is_torchvision_available():
        return
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    for name in ("", "_v2"):
        getattr(import_utils, f"is_torchvision{name}_available").cache_clear()


def load_processor(source: str, config: Any, local: bool) -> ChatProcessor:
    """The processor that fits a checkpoint; `local` forbids downloads.

    Raises ModelError if none can be built.
    """
    from transformers import AutoProcessor, AutoTokenizer

    if getattr(config, "vision_config", None) is None:
        return TextProcessor(AutoTokenizer.from_pretrained(source, local_files_only=local), config)
    hide_broken_torchvision()
    if torchvision_works():
        processor = AutoProcessor.from_pretrained(source, local_files_only=local)
        return AutoVisionProcessor(processor, config)
    image_processor = _pillow_image_processor(source, local)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    return PillowVisionProcessor(image_processor, tokenizer, config)


def _pillow_image_processor(source: str, local: bool) -> Any:
    """The Pillow variant of a Qwen-VL image processor, from its saved settings."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = _load_json(source, "processor_config.json", local).get("image_processor")
    settings = settings or _load_json(source, "preprocessor_config.json", local)
    kind = str(settings.get("image_processor_type", ""))
    if not kind.startswith("Qwen2VLImageProcessor"):
        raise ModelError(
            f"{source} uses the image processor {kind or 'unknown'}, which needs torchvision "
            f"({torchvision_problem()}): install one that matches your torch "
            "(`pip install 'hkvprof[video]'`)"
        )
    known = {k: v for k, v in settings.items() if k != "image_processor_type"}
    return Qwen2VLImageProcessorPil(**known)


def _load_json(source: str, name: str, local: bool) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(
        source, name, local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))) if path else {}


def _apply_template(renderer: Any, messages: list[dict[str, Any]], reply_next: bool) -> str:
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


@contextmanager
def _bad_image() -> Iterator[None]:
    """Image processors raise ValueError for sizes that they cannot use."""
    try:
        yield
    except ValueError as error:
        raise SampleError(f"the image processor refuses an image: {error}") from error
