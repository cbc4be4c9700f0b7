"""One sample as a user would run it: plain `model.generate()`, turn after turn, on one cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.samples import Sample, open_images


@dataclass(frozen=True)
class Sizes:
    """Bytes of a cache: by its own account, by summing its tensors (resident), and dense."""

    resident: int = 0
    storage: int = 0
    host: int = 0
    dense: int = 0


class Clock(StoppingCriteria):
    """Notes the time after every generated token, and looks at the cache at the first; stops
    nothing."""

    def __init__(self, look: Callable[[], Sizes]) -> None:
        self.times: list[float] = []
        self.look = look
        self.sizes = Sizes()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by generate() after each token."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        if not self.times:
            self.sizes = self.look()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last."""
        return self.times[-1] - self.times[0] if self.times else 0.0

    @property
    def decode_steps(self) -> int:
        """Tokens after the first."""
        return max(0, len(self.times) - 1)


@dataclass(frozen=True)
class Reply:
    """One answer: its text, decode time and steps, tokens in the cache before it, and the cache's
    sizes when its first token was there: the prompt is compressed, nothing is generated yet."""

    text: str
    expected: str
    decode_seconds: float
    decode_steps: int
    prompt_tokens: int
    sizes: Sizes


@torch.no_grad()
def converse(
    model: Any,
    processor: ChatProcessor,
    sample: Sample,
    cache: Any,
    max_new_tokens: int,
    look: Callable[[], Sizes] = Sizes,
) -> list[Reply]:
    """Ask the sample's question and its follow-ups greedily, all on `cache` (batch of one).

    `look` tells the cache's sizes.
    """
    conversation: list[Any] = list(open_images(sample))
    encoded = processor.encode([conversation])
    inputs = encoded.to(model.device, model.dtype)
    reply, ids = _ask(model, processor, inputs, cache, max_new_tokens, sample.reply or "", look)
    replies = [reply]
    for turn in sample.followups:
        suffix = _next_turn(processor, conversation, replies[-1].text, turn.question)
        ended = int(ids[0, -1]) == processor.tokenizer.eos_token_id
        text = suffix.removeprefix(processor.tokenizer.eos_token) if ended else suffix
        more = torch.tensor([processor.encode_text(text)], device=ids.device)
        ids = torch.cat([ids, more], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        reply, ids = _ask(model, processor, inputs, cache, max_new_tokens, turn.reply, look)
        replies.append(reply)
    return replies


def _ask(
    model: Any,
    processor: ChatProcessor,
    inputs: dict[str, Tensor],
    cache: Any,
    max_new_tokens: int,
    expected: str,
    look: Callable[[], Sizes],
) -> tuple[Reply, Tensor]:
    clock = Clock(look)
    tokens = inputs["input_ids"].shape[1]
    ids = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    text = processor.decode(ids[0, tokens:])
    seconds, steps = clock.decode_seconds, clock.decode_steps
    return Reply(text, expected, seconds, steps, tokens, clock.sizes), ids


def _next_turn(
    processor: ChatProcessor, conversation: list[Any], answer: str, question: str
) -> str:
    """Rendered text from the end of the answer to the opening of the next one."""
    conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    answered = processor.render(conversation, reply_next=False)
    end = answered.rfind(processor.tokenizer.eos_token)
    conversation.append({"role": "user", "content": [{"type": "text", "text": question}]})
    return processor.render(conversation, reply_next=True)[end:]
