"""Prompts of an exact length, and the tokens that every method is made to continue with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hkvprof.errors import UsageError
from hkvprof.models.outline import vocabulary
from hkvprof.models.processing import ChatProcessor, Encoded
from hkvprof.profile.budgets import Fetch

MIN_STEPS = 32
_ROW_OFFSET = 997
"""Tokens by which the prose of every further batch row starts later."""
_PROBE_IMAGES = 9


@dataclass(frozen=True)
class PromptSetup:
    """What is asked of a loaded model: contexts in tokens, budgets, `rounds` of `new_tokens` in
    all, batch.

    `fetch` is what a step may read (budgets.Fetch). `strict`: a budget that the profile itself
    cannot meet at a context is an error, not a row that says so.
    """

    contexts: tuple[int, ...]
    budgets: tuple[str, ...]
    new_tokens: int = 64
    rounds: int = 8
    batch: int = 1
    preallocated: bool = True
    strict: bool = True
    fetch: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if not self.contexts or min(self.contexts) < 1:
            raise UsageError("no context: expected prompt lengths in tokens such as 2048,8192")
        if min(self.batch, self.new_tokens, self.rounds) < 1:
            raise UsageError("batch, new tokens and rounds must be at least 1 each")
        Fetch.parse(self.fetch)
        timed = (self.block - 1) * self.rounds
        if timed < MIN_STEPS:
            raise UsageError(
                f"{self.new_tokens} new tokens in {self.rounds} rounds leave {max(timed, 0)} timed "
                f"steps (the first of a round warms up): expected at least {MIN_STEPS}, for "
                f"example --new-tokens {MIN_STEPS + 4} --rounds 4"
            )

    @property
    def block(self) -> int:
        """Steps of one method in one round, the first one included."""
        return self.new_tokens // self.rounds


@dataclass(frozen=True)
class Prompt:
    """Model inputs without padding, on the model's device, and the continuation."""

    inputs: dict[str, Tensor]
    forced: Int[Tensor, "rows steps"]
    source: str

    @property
    def tokens(self) -> int:
        """Length of every row."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        return int(self.inputs["input_ids"].shape[0])


PromptMaker = Callable[[int], Prompt]
"""Tokens -> the prompt of that length."""


@dataclass(frozen=True)
class Material:
    """What prompts are made of: an opening, text that fills up, and perhaps images.

    `images(row, count)` are message parts with `count` opened images for a batch row.
    """

    opening: str
    text: str
    images: Callable[[int, int], list[dict[str, Any]]] | None = None


def random_prompt(model: Any, tokens: int, rows: int, steps: int) -> Prompt:
    """Random token ids: for models that understand nothing anyway."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, vocabulary(model), (rows, tokens + steps), generator=generator)
    ids = ids.to(model.device)
    return Prompt({"input_ids": ids[:, :tokens]}, ids[:, tokens:], "random token ids")


def chat_prompt(
    model: Any, processor: ChatProcessor, material: Material, tokens: int, rows: int, steps: int
) -> Prompt:
    """A user's message of exactly `tokens` tokens per row: images first, if any, then text.

    Raises UsageError if `tokens` is less than the chat format and one image need.
    """
    filler = _filler(processor, material.text, tokens + steps)
    count = _image_count(processor, material, tokens, rows) if material.images is not None else 0
    encoded = [_message(processor, material, row, count) for row in range(rows)]
    need = max(one.tokens for one in encoded)
    if need > tokens:
        with_image = " with one image" if count else ""
        raise UsageError(
            f"a context of {tokens} tokens is too short: the chat format{with_image} takes {need}; "
            f"give at least --context {need + 1}"
        )
    at = [_insertion(processor, material, one) for one in encoded]
    shifted = [filler.roll(-_ROW_OFFSET * row) for row in range(rows)]
    filled = [_fill(*row, tokens) for row in zip(encoded, at, shifted, strict=True)]
    forced = torch.stack([text[tokens - one.tokens :][:steps]
                          for one, text in zip(encoded, shifted, strict=True)])  # fmt: skip
    joined = {key: torch.cat([row[key] for row in filled]) for key in filled[0]}
    if material.images is None:
        del joined["attention_mask"]
    inputs = Encoded(joined, joined["input_ids"]).to(model.device, model.dtype)
    source = f"{count} images and text" if count else "prose"
    return Prompt(inputs, forced.to(model.device), source)


def _filler(processor: ChatProcessor, text: str, tokens: int) -> Int[Tensor, " tokens"]:
    """At least `tokens` ids of the text, which is repeated as needed."""
    ids = torch.tensor(processor.encode_text(text[: 12 * tokens]))
    if not len(ids):
        raise UsageError("the model's tokenizer turns the prompt's text into nothing")
    return ids.repeat(-(-tokens // len(ids)))


def _conversation(material: Material, row: int, count: int) -> list[dict[str, Any]]:
    parts = material.images(row, count) if material.images is not None else []
    content = [*parts, {"type": "text", "text": material.opening}]
    return [{"role": "user", "content": content}]


def _message(processor: ChatProcessor, material: Material, row: int, count: int) -> Encoded:
    return processor.encode([_conversation(material, row, count)])


def _image_count(processor: ChatProcessor, material: Material, tokens: int, rows: int) -> int:
    """The most images (at least 1) with which every row takes up to `tokens` tokens, to a few."""
    least = _message(processor, material, 0, 1).tokens
    each = (_message(processor, material, 0, _PROBE_IMAGES).tokens - least) / (_PROBE_IMAGES - 1)
    count = max(1, 1 + int((tokens - least) / each))
    while count > 1:
        longest = max(_message(processor, material, row, count).tokens for row in range(rows))
        if longest <= tokens:
            break
        count = max(1, count - max(1, int((longest - tokens) / each)))
    return count


def _insertion(processor: ChatProcessor, material: Material, encoded: Encoded) -> int:
    """Position right after the opening, which is the end of the user's message."""
    rendered = processor.render(_conversation(material, 0, 0), reply_next=True)
    end = rendered.rfind(material.opening) + len(material.opening)
    return encoded.tokens - len(processor.encode_text(rendered[end:]))


def _fill(encoded: Encoded, at: int, filler: Tensor, tokens: int) -> dict[str, Tensor]:
    """Inputs of one row, `filler` inserted at position `at` up to a length of `tokens`.

    Every input with one column per token grows: ids by the filler, masks by ones, types by zeros.
    """
    length = encoded.tokens
    extra: dict[str, Any] = {"input_ids": filler[: tokens - length], "attention_mask": 1}
    grown = {}
    for key, value in encoded.inputs.items():
        if value.ndim == 2 and value.shape == (1, length) and not value.is_floating_point():
            new = value.new_zeros((1, tokens - length)) + extra.get(key, 0)
            value = torch.cat([value[:, :at], new, value[:, at:]], dim=1)
        grown[key] = value
    return grown
