"""One sample as a user would run it: plain `model.generate()`, turn after turn, on one cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.samples import Sample, open_images


class Clock(StoppingCriteria):
    """Notes the time after every generated token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by generate() after each token."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
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
    """One answer: its text, decode time and steps, and tokens in the cache before it."""

    text: str
    expected: str
    decode_seconds: float
    decode_steps: int
    prompt_tokens: int


@torch.no_grad()
def converse(
    model: Any,
    processor: ChatProcessor,
    sample: Sample,
    cache: Any,
    max_new_tokens: int,
) -> list[Reply]:
    """Ask the sample's question and its follow-ups greedily, all on `cache` (batch of one)."""
    conversation: list[Any] = list(open_images(sample))
    encoded = processor.encode([conversation])
    inputs = encoded.to(model.device, model.dtype)
    reply, ids = _ask(model, processor, inputs, cache, max_new_tokens, sample.reply or "")
    replies = [reply]
    for turn in sample.followups:
        suffix = _next_turn(processor, conversation, replies[-1].text, turn.question)
        ended = int(ids[0, -1]) == processor.tokenizer.eos_token_id
        text = suffix.removeprefix(processor.tokenizer.eos_token) if ended else suffix
        more = torch.tensor([processor.encode_text(text)], device=ids.device)
        ids = torch.cat([ids, more], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        reply, ids = _ask(model, processor, inputs, cache, max_new_tokens, turn.reply)
        replies.append(reply)
    return replies


def _ask(
    model: Any,
    processor: ChatProcessor,
    inputs: dict[str, Tensor],
    cache: Any,
    max_new_tokens: int,
    expected: str,
) -> tuple[Reply, Tensor]:
    clock = Clock()
    tokens = inputs["input_ids"].shape[1]
    ids = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    text = processor.decode(ids[0, tokens:])
    return Reply(text, expected, clock.decode_seconds, clock.decode_steps, tokens), ids


def _next_turn(
    processor: ChatProcessor, conversation: list[Any], answer: str, question: str
) -> str:
    """Rendered text from the end of the answer to the opening of the next one."""
    conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    answered = processor.render(conversation, reply_next=False)
    end = answered.rfind(processor.tokenizer.eos_token)
    conversation.append({"role": "user", "content": [{"type": "text", "text": question}]})
    return processor.render(conversation, reply_next=True)[end:]
