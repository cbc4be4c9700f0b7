"""Processors of vision models: transformers' own, and one for Qwen-VL without torchvision.

Both give equal token ids, masks and grids; pixels agree up to rounding (1e-6; at most two grey
levels where an image is resized; tests/models/test_processing.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from jaxtyping import Int
from torch import Tensor

from hkvprof.errors import SampleError
from hkvprof.lazy import install_hint
from hkvprof.models.architectures import adapter_for
from hkvprof.models.processing import (
    ChatProcessor,
    Conversation,
    Encoded,
    Video,
    apply_template,
    images_of,
    parts_of,
    refuse_context,
    refuse_placeholder,
    videos_of,
)


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


_NOT_FOR_FORWARD = ("labels",)
"""Processors' outputs that are for training: a model given them computes a loss."""


class VisionProcessor(ChatProcessor):
    """What all vision processors share: rendering, and the modality of every position."""

    renderer: Any

    def render(self, conversation: Conversation, *, reply_next: bool) -> str:
        """See ChatProcessor."""
        listed = [{"role": m["role"], "content": parts_of(m["content"])} for m in conversation]
        return apply_template(self.renderer, listed, reply_next)

    def _modality(self, ids: Tensor) -> Tensor:
        return adapter_for(self.config).modality(ids, self.config)


class AutoVisionProcessor(VisionProcessor):
    """transformers' own processor, as AutoProcessor loads it."""

    def __init__(self, processor: Any, config: Any) -> None:
        super().__init__(processor.tokenizer, config)
        if not processor.chat_template:
            processor.chat_template = adapter_for(config).chat_template or None
        self.renderer = self.processor = processor

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """See ChatProcessor."""
        refuse_context(conversations)
        images = [images_of(conversation) for conversation in conversations]
        videos = [video for conversation in conversations for video in videos_of(conversation)]
        texts = [self.render(conversation, reply_next=True) for conversation in conversations]
        for name in ("image_token", "video_token"):
            refuse_placeholder(conversations, getattr(self.processor, name, None))
        begun = texts[0].startswith(self.tokenizer.bos_token or "\0")
        with _bad_image():
            batch = self.processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                add_special_tokens=not begun,
                return_tensors="pt",
                **self._video_options(videos),
            )
        inputs = {
            key: value
            for key, value in batch.items()
            if isinstance(value, Tensor) and key not in _NOT_FOR_FORWARD
        }
        return Encoded(inputs, self._modality(inputs["input_ids"]))

    def _video_options(self, videos: list[Video]) -> dict[str, Any]:
        """Frames as they are given, with the rate that M-RoPE's time axis depends on."""
        if not videos:
            return {}
        if not adapter_for(self.config).videos:
            raise SampleError(
                f"video input is not supported for {self.config.model_type}: give the frames as "
                "images"
            )
        from transformers.video_utils import VideoMetadata

        rates = [
            VideoMetadata(
                total_num_frames=len(frames), fps=fps, frames_indices=list(range(len(frames)))
            )
            for frames, fps in videos
        ]
        return {
            "videos": [frames for frames, _ in videos],
            "video_metadata": rates,
            "do_sample_frames": False,
        }


class PillowVisionProcessor(VisionProcessor):
    """Image processor and tokenizer of the Qwen-VL family, without torchvision (images only)."""

    def __init__(self, image_processor: Any, tokenizer: Any, config: Any) -> None:
        super().__init__(tokenizer, config)
        self.renderer = tokenizer
        self.image_processor = image_processor
        self.placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """See ChatProcessor."""
        refuse_context(conversations)
        if any(videos_of(conversation) for conversation in conversations):
            raise SampleError(
                f"video input needs torchvision ({torchvision_problem() or 'it is not used'}): "
                f"{install_hint('video')}; or give the frames as images"
            )
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


@contextmanager
def _bad_image() -> Iterator[None]:
    """Image processors raise ValueError for sizes that they cannot use."""
    try:
        yield
    except ValueError as error:
        raise SampleError(f"the image processor refuses an image: {error}") from error
