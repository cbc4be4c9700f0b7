"""Prompts that fit any model: ordinary tokens of its vocabulary, and drawn pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.doctor.records import NotApplicableError
from hkvprof.errors import HkvError
from hkvprof.heads import EXACT_BITS, KeepRule
from hkvprof.models.adapter import ModelView
from hkvprof.models.calls import with_cache
from hkvprof.models.outline import context_limit, pad_token, special_tokens, vocabulary
from hkvprof.models.processing import ChatProcessor, TextProcessor
from hkvprof.profile.record import Profile

_LEAST, _SPAN = 0.3, 0.3
_GOLDEN = 0.6180339887498949
"""Its multiples, fractions taken, never repeat and lie evenly."""


def probe_profile(model: Any, bits: int = EXACT_BITS) -> Profile:
    """Static and dynamic heads in turns, each with a share of its own; the budget is their mean.

    Static heads keep their tokens in so many bits, dynamic ones theirs in 8 if these are fewer.
    """
    plain = uniform_profile(model)
    shape = plain.strategy.shape
    number = np.arange(plain.grid.total).reshape(shape)
    layer, head = np.divmod(number, plain.grid.kv_heads)
    shares = (_LEAST + _SPAN * np.modf(_GOLDEN * (number + 1))[0]).astype(np.float32)
    made = uniform_profile(
        model, (layer + head) % 2, budget=float(shares.mean()), chunk=4, keep=KeepRule(4, 8, 16)
    )
    static, dynamic = made.strategies
    menu = (replace(static, resident_bits=bits), replace(dynamic, resident_bits=max(bits, 8)))
    return replace(made, budget=shares, strategies=menu)


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
        """The longest context of the model in tokens; 4096 where its config does not say."""
        return context_limit(self.model) or 4096

    @cached_property
    def prompt_tokens(self) -> int:
        """Tokens of an ordinary text prompt: shorter on models with few positions."""
        return min(PROMPT, self.limit // 2)

    @cached_property
    def _ordinary(self) -> Int[Tensor, " ids"]:
        """Token ids of the vocabulary other than begin, end, padding and such."""
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


SHUFFLE_AFTER = 3


@dataclass(frozen=True)
class Script:
    """A prompt (`inputs`, left padded), `forced` replies [rows, steps] to it, and perhaps a second
    `turn` [rows, new] with `more` forced tokens.

    `options` go to the generation config; after `SHUFFLE_AFTER` passes rows of the cache are
    reordered as `shuffle` says, as beam search does.
    """

    inputs: dict[str, Tensor]
    forced: Int[Tensor, "rows steps"]
    turn: Int[Tensor, "rows new"] | None = None
    more: Int[Tensor, "rows steps"] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shuffle: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Length of the prompt, padding included."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def rows(self) -> int:
        """How many prompts the batch has."""
        return int(self.inputs["input_ids"].shape[0])

    @property
    def starts(self) -> list[int]:
        """First valid position of every row."""
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return [0] * self.rows
        return [int(row.argmax()) for row in mask]


class _Forced(LogitsProcessor):
    """Only the given token is possible at every step; rows of the cache may be shuffled before."""

    def __init__(self, tokens: Tensor, start: int, cache: Any, shuffle: tuple[int, ...]) -> None:
        self.tokens, self.start, self.cache, self.shuffle = tokens, start, cache, shuffle

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        if self.shuffle and step == SHUFFLE_AFTER:
            self.cache.reorder_cache(torch.tensor(self.shuffle, device=scores.device))
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, self.tokens[:, step : step + 1], 0.0)


@torch.no_grad()
def play(model: Any, script: Script, cache: Any = None) -> list[Tensor]:
    """Run a whole script through `model.generate`: the logits of every pass, [rows, vocabulary].

    Without `cache` (one turn only) the model, or what is hooked to it, makes its own.
    """
    logits = first_turn(model, script, cache)
    return logits if script.turn is None else logits + second_turn(model, script, cache)


def first_turn(model: Any, script: Script, cache: Any = None) -> list[Tensor]:
    """The prompt and its forced reply."""
    return _generate(model, script.inputs, script.forced, cache, script)


def second_turn(model: Any, script: Script, cache: Any) -> list[Tensor]:
    """The second turn and its forced reply; images and such are in the cache already."""
    assert script.turn is not None
    assert script.more is not None
    ids = torch.cat([script.inputs["input_ids"], script.forced, script.turn], dim=1)
    mask = script.inputs.get("attention_mask", torch.ones_like(script.inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(ids.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return _generate(model, inputs, script.more, cache, None)


@torch.no_grad()
def _generate(
    model: Any, inputs: dict[str, Tensor], forced: Tensor, cache: Any, script: Script | None
) -> list[Tensor]:
    steps = forced.shape[1]
    options = {} if script is None else script.options
    own = {} if cache is None else with_cache(model, cache)
    shuffle = () if script is None else script.shuffle
    forcing = _Forced(forced, inputs["input_ids"].shape[1], cache, shuffle)
    output = model.generate(
        **inputs,
        **own,
        generation_config=greedy(model, steps, **options),
        logits_processor=LogitsProcessorList([forcing]),
    )
    return list(output.logits)


def greedy(model: Any, steps: int, **more: Any) -> GenerationConfig:
    """Exactly `steps` new tokens, with the logits of every pass."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=steps, min_new_tokens=steps, num_beams=more.pop("beams", 1),
        output_logits=True, return_dict_in_generate=True, pad_token_id=pad_token(model),
        **more,
    )  # fmt: skip
