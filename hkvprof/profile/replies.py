"""The model's own replies, where samples have none or the model's are to be judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hkvprof.models.calls import with_cache
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.continuation import opening_of_turn
from hkvprof.profile.samples import Sample, Turn

MAX_REPLY_TOKENS = 48


@torch.no_grad()
def answered(
    model: Any, processor: ChatProcessor, sample: Sample, cache: Any, token: Tensor, later: bool
) -> Sample:
    """The sample with the model's own reply, and with its own to `later` questions too.

    `cache` holds the prompt and is left as it was, `token` is the first of the reply.
    """
    replies = [_greedy(model, processor, cache, token)]
    if not later:
        return replace(sample, reply=replies[0])
    for _ in sample.followups:
        ids = torch.tensor([opening_of_turn(processor, sample, replies)])
        output = model(input_ids=ids.to(model.device), **with_cache(model, cache))
        replies.append(_greedy(model, processor, cache, output.logits[:, -1:].argmax(-1)))
        cache.crop(-ids.shape[1])
    turns = zip(sample.followups, replies[1:], strict=True)
    followups = tuple(Turn(turn.question, reply) for turn, reply in turns)
    return replace(sample, reply=replies[0], followups=followups)


def _greedy(model: Any, processor: ChatProcessor, cache: Any, token: Tensor) -> str:
    """A reply, dense and greedy; leaves the cache as it was."""
    end = processor.tokenizer.eos_token_id
    reply: list[int] = []
    while len(reply) < MAX_REPLY_TOKENS and int(token) != end:
        reply.append(int(token))
        output = model(input_ids=token, **with_cache(model, cache))
        token = output.logits[:, -1:].argmax(-1)
    cache.crop(-len(reply))
    return processor.decode(reply)
