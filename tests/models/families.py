"""Processors for the tiny models: the real classes where they work here, else a stand-in.

A stand-in puts as many placeholders into the prompt as the model makes features of an image; its
pixels come from the real image processor where that works without torchvision. It stands where
transformers' processor class does not. With torchvision (tests.models.torchvision_shim) all are
real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from hkvprof.models.architectures import adapter_for
from hkvprof.models.processing import ChatProcessor, Conversation, Encoded, TextProcessor, images_of
from hkvprof.models.vision import (
    AutoVisionProcessor,
    PillowVisionProcessor,
    VisionProcessor,
    torchvision_works,
)

IMAGE, VIDEO, BEGIN, END = 5, 6, 7, 8
"""Ids of the tokens around an image, as the tiny configs have them."""
VOCABULARY = 128
SIDE = 28


@dataclass(frozen=True)
class Family:
    """How a vision model's processor is made.

    `special` are the texts of tokens IMAGE, VIDEO, BEGIN and END and of what follows them; `named`
    the attributes that the tokenizer offers them under; `written` is what a template writes for an
    image. `needs`: what keeps transformers' processor class from being made without torchvision,
    `packages` what else must be installed then.
    """

    processor: str
    image_processor: str
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    special: tuple[str, ...] = ("<image>", "<video>", "<begin>", "<end>")
    named: dict[str, int] = field(default_factory=dict)
    written: str = "<image>"
    needs: str = ""
    video_processor: str = ""
    packages: tuple[str, ...] = ()


def _old_release(name: str) -> str:
    """`name` where that Pillow class asks for torchvision, as it does in older releases."""
    return name if "torchvision" in getattr(getattr(hf, name), "_backends", ()) else ""


_CROPS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
_CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default"}
_PIECES = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
_PIECE_TOKENS = (
    "<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)  # fmt: skip
_QWEN = Family(
    "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor",
    {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": 12544}},
    special=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    named={"image_token": 0, "video_token": 1},
    written="<|vision_start|><|image_pad|><|vision_end|>", video_processor="Qwen2VLVideoProcessor",
)  # fmt: skip
_QWEN3 = replace(
    _QWEN,
    processor="Qwen3VLProcessor",
    video_processor="Qwen3VLVideoProcessor",
    settings={
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 16384},
    },
)
_PIXTRAL = Family(
    "PixtralProcessor", "PixtralImageProcessor",
    {"size": {"longest_edge": 2 * SIDE}, "patch_size": 14}, {"patch_size": 14},
    special=("[IMG]", "<video>", "[IMG_BREAK]", "[IMG_END]"), written="[IMG]",
    needs="PixtralProcessor",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "qwen2-vl": replace(_QWEN, processor="Qwen2VLProcessor"),
    "qwen2.5-vl": _QWEN,
    "qwen3-vl": _QWEN3,
    "qwen3-vl-moe": _QWEN3,
    "llava": Family(
        "LlavaProcessor", "CLIPImageProcessor", _CLIP, {**_LLAVA, "num_additional_image_tokens": 1}
    ),
    "llava-next": Family(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        {**_CLIP, **_CROPS},
        {**_LLAVA, "num_additional_image_tokens": 1},
    ),
    "llava-onevision": Family(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessor",
        {**_SQUARE, **_CROPS},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        needs="LlavaOnevisionVideoProcessor",
        video_processor="LlavaOnevisionVideoProcessor",
    ),
    "internvl": Family(
        "InternVLProcessor",
        "GotOcr2ImageProcessor",
        {"size": {"height": 2 * SIDE, "width": 2 * SIDE}},
        {"image_seq_length": 4},
        special=("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
        named={
            "context_image_token": 0,
            "video_token": 1,
            "start_image_token": 2,
            "end_image_token": 3,
        },
        written="<IMG_CONTEXT>",
        needs="InternVLVideoProcessor",
        video_processor="InternVLVideoProcessor",
    ),
    "idefics3": Family(
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        _PIECES,
        {"image_seq_len": 1},
        special=_PIECE_TOKENS,
        needs=_old_release("Idefics3ImageProcessorPil"),
    ),
    "smolvlm": Family(
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        _PIECES,
        {"image_seq_len": 1},
        special=_PIECE_TOKENS,
        needs="SmolVLMVideoProcessor",
        video_processor="SmolVLMVideoProcessor",
        packages=("num2words",),
    ),
    "gemma3": Family(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        _SQUARE,
        {"image_seq_length": 4},
        special=("<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>"),
        named={"image_token": 0, "boi_token": 2, "eoi_token": 3},
        written="<start_of_image>",
    ),
    "paligemma": Family(
        "PaliGemmaProcessor", "SiglipImageProcessor", {**_SQUARE, "image_seq_length": 4}
    ),
    "pixtral": _PIXTRAL,
    "mistral3": replace(_PIXTRAL, options={"patch_size": 14, "spatial_merge_size": 2}),
}


def words(count: int, seed: int = 0) -> str:
    """Text of `count` tokens."""
    return " ".join(f"w{(seed * 31 + i * i * 7 + i) % 90}" for i in range(count))


def tokenizer_of(family: Family | None) -> Any:
    """A tokenizer of words, with a family's special tokens at their ids and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    special += () if family is None else family.special
    names = special + [f"w{i}" for i in range(VOCABULARY - len(special))]
    backend = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    named = {} if family is None else {k: family.special[i] for k, i in family.named.items()}
    image = "" if family is None else family.written
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=named, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}" + image + "{% elif p.type == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %} {{ p.text }}{% endif %}"
        "{% endfor %}{% endif %}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


class SquarePixels:
    """Stands for Idefics3's and SmolVLM's image processor: every image as one square."""

    def __call__(self, images: Sequence[Sequence[Any]], return_tensors: str) -> dict[str, Tensor]:
        most = max(map(len, images))
        pixels = torch.zeros(len(images), most, 3, SIDE, SIDE)
        mask = torch.zeros(len(images), most, SIDE, SIDE, dtype=torch.long)
        for row, pictures in enumerate(images):
            for column, image in enumerate(pictures):
                grey = np.asarray(image.resize((SIDE, SIDE)).convert("RGB"), dtype=np.float32)
                pixels[row, column] = torch.from_numpy(grey / 127.5 - 1).permute(2, 0, 1)
                mask[row, column] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


class StandIn(VisionProcessor):
    """Placeholders counted by the model itself."""

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, written: str) -> None:
        super().__init__(tokenizer, model.config)
        self.renderer, self.model, self.written = tokenizer, model, written
        self.image_processor = image_processor

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """See ChatProcessor."""
        texts = [self.render(conversation, reply_next=True) for conversation in conversations]
        images = [images_of(conversation) for conversation in conversations]
        vision = self.image_processor(images=images, return_tensors="pt")
        for name in ("num_patches", "rows", "cols"):
            vision.pop(name, None)
        features = self._features(dict(vision), len([i for row in images for i in row]))
        counts = iter(features)
        expanded = []
        for text in texts:
            head, *rest = text.split(self.written)
            expanded.append(head + "".join(self.written * next(counts) + part for part in rest))
        batch = self.tokenizer(
            expanded, add_special_tokens=False, padding=True, return_tensors="pt"
        )
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return Encoded({**vision, **inputs}, self._modality(inputs["input_ids"]))

    def _features(self, vision: dict[str, Tensor], images: int) -> list[int]:
        """How many tokens the model makes of every image."""
        with torch.no_grad():
            made = self.model.model.get_image_features(**vision).pooler_output
        if isinstance(made, (list, tuple)) and len(made) == images:
            return [len(one) for one in made]
        total = sum(len(one) for one in made) if isinstance(made, list) else made[..., 0].numel()
        return [total // images] * images


def processor_of(name: str, model: Any) -> tuple[ChatProcessor, str]:
    """A processor for one of the tiny models, and the class behind it as tables name it."""
    family = FAMILIES.get(name)
    tokenizer = tokenizer_of(family)
    if family is None:
        return TextProcessor(tokenizer, model.config), "tokenizer"
    real = torchvision_works()
    if family.needs and not (real and all(map(find_spec, family.packages))):
        pieces = family.settings is _PIECES
        pixels = (
            SquarePixels() if pieces else _make(family.image_processor + "Pil", family.settings)
        )
        return StandIn(model, pixels, tokenizer, family.special[0]), "stand-in"
    if adapter_for(model.config).pillow and not real:
        image_processor = _make(family.image_processor + "Pil", family.settings)
        return PillowVisionProcessor(
            image_processor, tokenizer, model.config
        ), "PillowVisionProcessor"
    if name == "paligemma":
        tokenizer.chat_template = None  # it has none: the adapter's is used
    image_processor = _make(family.image_processor + ("" if real else "Pil"), family.settings)
    make: Callable[..., Any] = getattr(hf, family.processor)
    options = dict(family.options)
    if family.video_processor:
        sizes = family.settings if "merge_size" in family.settings else {}
        options["video_processor"] = _make(family.video_processor, sizes)
    processor = make(
        image_processor=image_processor, tokenizer=tokenizer,
        chat_template=tokenizer.chat_template, **options,
    )  # fmt: skip
    return AutoVisionProcessor(processor, model.config), family.processor


def _make(name: str, settings: dict[str, Any]) -> Any:
    made = getattr(hf, name)(**{k: v for k, v in settings.items() if k != "image_seq_length"})
    if "image_seq_length" in settings:
        made.image_seq_length = settings["image_seq_length"]
    return made
