"""Prompts that fit any model: ordinary tokens of its vocabulary, and drawn pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.artifact import Profile
from hkvprof.doctor.records import NotApplicableError
from hkvprof.doctor.script import Script
from hkvprof.errors import HkvError
from hkvprof.models.adapter import ModelView
from hkvprof.models.limits import context_limit, pad_token, special_tokens, vocabulary
from hkvprof.models.processing import ChatProcessor, TextProcessor

PROMPT = 256
"""Tokens of an ordinary text prompt."""
STEPS = 6
TURN = 5
_PICTURES = ((280, 280), (280, 224), (224, 280))
"""Width and height in pixels."""
_FRAMES = 4


@dataclass(frozen=True)
class Patient:
    """What is examined. Without a processor only text can be checked."""

    model: Any
    view: ModelView
    processor: ChatProcessor | None = None
    profile: Profile | None = None

    @cached_property
    def limit(self) -> int:
        """The longest context."""
        return context_limit(self.model) or 4096

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of an ordinary text prompt: shorter on models with few positions."""
        return min(PROMPT, self.limit // 2)

    @cached_property
    def _ordinary(self) -> Int[Tensor, " ids"]:
        """Ids of the vocabulary that mean nothing special."""
        size = vocabulary(self.model)
        special = special_tokens(self.model)
        special |= {i for i in self.view.fingerprint.vision.values() if isinstance(i, int)}
        if self.processor is not None:
            tokenizer = self.processor.tokenizer
            special |= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            size = min(size, len(tokenizer))
        lowest = 0 if self.processor is not None else 16  # low ids are often special ones
        return torch.tensor([i for i in range(lowest, size) if i not in special])

    def ids(self, rows: int, tokens: int, seed: int) -> Int[Tensor, "rows tokens"]:
        """Ordinary tokens, on the model's device."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self._ordinary), (rows, tokens), generator=generator)
        return self._ordinary[drawn].to(self.model.device)

    def replies(self, rows: int, steps: int = STEPS, turn: bool = False) -> dict[str, Any]:
        """The forced tokens of a script, with a second turn if asked."""
        given: dict[str, Any] = {"forced": self.ids(rows, steps, seed=7)}
        if turn:
            given |= {"turn": self.ids(rows, TURN, seed=8), "more": self.ids(rows, 3, seed=9)}
        return given

    def text(
        self, lengths: list[int], seed: int = 1, steps: int = STEPS, turn: bool = False,
        **changes: Any,
    ) -> Script:  # fmt: skip
        """Text prompts of these lengths, left padded."""
        longest = max(lengths)
        ids = self.ids(len(lengths), longest, seed)
        mask = torch.ones_like(ids)
        pad = pad_token(self.model)
        for row, length in enumerate(lengths):
            ids[row, : longest - length] = pad
            mask[row, : longest - length] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        return Script(inputs, **self.replies(len(lengths), steps, turn), **changes)

    def images(self, counts: list[int], turn: bool = False, steps: int = STEPS) -> Script:
        """One row per count, with so many pictures and a question. Raises NotApplicableError."""
        if self.processor is None or isinstance(self.processor, TextProcessor):
            raise NotApplicableError("the model takes no images")
        rows = [[_picture(*_PICTURES[i % 3], seed=i) for i in range(count)] for count in counts]
        parts = [[{"type": "image", "image": image} for image in row] for row in rows]
        return self._chat(parts, turn, steps)

    def video(self) -> Script:
        """One row with a video of a few frames. Raises NotApplicableError."""
        if "video_token_id" not in self.view.fingerprint.vision or self.processor is None:
            raise NotApplicableError("the model takes no video")
        frames = [_picture(224, 224, seed=i) for i in range(_FRAMES)]
        try:
            return self._chat([[{"type": "video", "video": frames}]], turn=True, steps=STEPS)
        except HkvError as error:
            raise NotApplicableError(str(error)) from error

    def _chat(self, parts: list[list[dict[str, Any]]], turn: bool, steps: int) -> Script:
        assert self.processor is not None
        question = self.processor.decode(self.ids(1, 24, seed=3)[0])
        encoded = self.processor.encode(
            [
                [{"role": "user", "content": [*row, {"type": "text", "text": question}]}]
                for row in parts
            ]
        )
        inputs = encoded.to(self.model.device, self.model.dtype)
        return Script(inputs, **self.replies(len(parts), steps, turn))


def _picture(width: int, height: int, seed: int) -> Any:
    """A colour gradient with noise, as a PIL image."""
    from PIL import Image

    across = np.linspace(0, 255, width)[None, :, None]
    down = np.linspace(255, 0, height)[:, None, None]
    noise = np.random.default_rng(seed).integers(-60, 60, (height, width, 3))
    pixels = (across + down) / 2 + noise + np.array([0, 30 * seed, -30])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
