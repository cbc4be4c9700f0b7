"""Loading of a tinyvl folder: the model, and a processor that needs no torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hkvprof.errors import ModelError
from hkvprof.testbed.vocabulary import IMAGE_PAD

SHIPPED = Path(__file__).parent / "tinyvl"
"""The checkpoint in the package."""


class TinyProcessor:
    """Chat messages with images to model inputs.

    transformers' own processor of this family needs torchvision for videos, which the testbed has
    none of; here the image processor, the tokenizer and the chat template are put together.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    def encode(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
        """A left-padded batch, ready for `generate`: one conversation is a list of messages.

        `mm_token_type_ids` (1 on image tokens) is what the model needs for its 3-D positions.
        """
        pads = [image for messages in conversations for image in _images(messages)]
        vision: dict[str, Tensor] = {}
        if pads:
            vision = dict(self.image_processor(images=pads, return_tensors="pt"))
        merged = int(self.image_processor.merge_size) ** 2
        counts = iter([int(grid.prod()) // merged for grid in vision.get("image_grid_thw", [])])
        texts = []
        for messages in conversations:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            first, *rest = text.split(IMAGE_PAD)
            texts.append(first + "".join(IMAGE_PAD * next(counts) + piece for piece in rest))
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        is_image = (tokens["input_ids"] == self.image_token_id).long()
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": is_image,
            **vision,
        }


def _images(messages: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The images of a conversation in reading order."""
    images = []
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                image = part["image"] if "image" in part else Image.open(part["path"])
                images.append(image.convert("RGB"))
    return images


def load_checkpoint(
    folder: Path = SHIPPED, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, TinyProcessor]:
    """The model in evaluation mode and its processor."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no checkpoint: expected a folder with config.json")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    return model.eval().to(device), TinyProcessor(folder)
