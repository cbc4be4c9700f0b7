"""What follows a prompt: the reply and later turns, as token ids with a role for every row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hkvprof.errors import SampleError
from hkvprof.models.calls import with_cache
from hkvprof.models.processing import ChatProcessor
from hkvprof.samples.read import Sample, Turn


@dataclass(frozen=True)
class Continuation:
    """Token ids after the prompt, and the rows whose prediction belongs to a reply.

    `rows` are positions within `ids` whose NEXT token is a reply token (target `ids[row + 1]`);
    `exact` tells for each of them whether the runtime computes it in a pass of several tokens (the
    last row of a later question), where dynamic heads attend to all their host chunks.
    """

    ids: Tensor
    rows: Tensor
    exact: Tensor

    @property
    def targets(self) -> Tensor:
        """The reply tokens that `rows` predict."""
        return self.ids[self.rows + 1]


def build_continuation(
    processor: ChatProcessor, sample: Sample, reply: str, max_tokens: int
) -> Continuation:
    """Tokenise the reply and the follow-up turns, piece by piece, through the chat template.

    No turn is added whose reply would begin after `max_tokens` tokens; replies are never cut.
    Raises SampleError if the template rewrites earlier turns or nothing is left to predict.
    """
    conversation: list[dict[str, Any]] = [dict(message) for message in sample.messages]
    rendered = processor.render(conversation, reply_next=True)
    ids: list[int] = []
    rows: list[int] = []
    exact: list[bool] = []
    answer: str | None = reply
    turns = list(sample.followups)
    while answer is not None:
        conversation.append({"role": "assistant", "content": _text(answer)})
        rendered, piece = _extend(processor, sample, conversation, rendered, reply_next=False)
        tokens = processor.encode_text(piece)
        spoken = _until_end_of_turn(processor, tokens)
        first = len(ids) - 1
        if first >= 0:
            rows.append(first)
            exact.append(True)
        rows += range(first + 1, first + spoken)
        exact += [False] * (spoken - 1)
        ids += tokens
        answer = None
        if turns:
            turn = turns.pop(0)
            conversation.append({"role": "user", "content": _text(turn.question)})
            rendered, piece = _extend(processor, sample, conversation, rendered, reply_next=True)
            question = processor.encode_text(piece)
            if len(ids) + len(question) < max_tokens:
                ids += question
                answer = turn.reply
    if not rows:
        raise SampleError(
            f"sample {sample.id}: the reply has one token; nothing is decoded after it"
        )
    return Continuation(torch.tensor(ids), torch.tensor(rows), torch.tensor(exact))


def opening_of_turn(processor: ChatProcessor, sample: Sample, replies: list[str]) -> list[int]:
    """Token ids between the prompt and the next reply, when `replies` have been given so far.

    `replies` answer the question and the first follow-ups; the ids end where the next one begins.
    """
    conversation: list[dict[str, Any]] = [dict(message) for message in sample.messages]
    rendered = processor.render(conversation, reply_next=True)
    ids: list[int] = []
    for reply, turn in zip(replies, sample.followups, strict=False):
        for role, text in (("assistant", reply), ("user", turn.question)):
            conversation.append({"role": role, "content": _text(text)})
            rendered, piece = _extend(
                processor, sample, conversation, rendered, reply_next=role == "user"
            )
            ids += processor.encode_text(piece)
    return ids


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _extend(
    processor: ChatProcessor,
    sample: Sample,
    conversation: list[dict[str, Any]],
    before: str,
    *,
    reply_next: bool,
) -> tuple[str, str]:
    after = processor.render(conversation, reply_next=reply_next)
    if not after.startswith(before):
        raise SampleError(
            f"sample {sample.id}: the chat template rewrites earlier turns, so that a conversation "
            "cannot be continued; leave reply and followups out"
        )
    return after, after[len(before) :]


def _until_end_of_turn(processor: ChatProcessor, tokens: list[int]) -> int:
    """Number of tokens up to and including the end-of-turn token (all, if there is none)."""
    end = processor.tokenizer.eos_token_id
    return tokens.index(end) + 1 if end in tokens else len(tokens)


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
        with _as_it_was(cache):
            output = model(input_ids=ids.to(model.device), **with_cache(model, cache))
            replies.append(_greedy(model, processor, cache, output.logits[:, -1:].argmax(-1)))
    turns = zip(sample.followups, replies[1:], strict=True)
    followups = tuple(Turn(turn.question, reply) for turn, reply in turns)
    return replace(sample, reply=replies[0], followups=followups)


def _greedy(model: Any, processor: ChatProcessor, cache: Any, token: Tensor) -> str:
    """A reply, dense and greedy; leaves the cache as it was."""
    end = processor.tokenizer.eos_token_id
    reply: list[int] = []
    with _as_it_was(cache):
        while len(reply) < MAX_REPLY_TOKENS and int(token) != end:
            reply.append(int(token))
            output = model(input_ids=token, **with_cache(model, cache))
            token = output.logits[:, -1:].argmax(-1)
    return processor.decode(reply)


@contextmanager
def _as_it_was(cache: Any) -> Iterator[None]:
    """Within, the cache takes tokens; afterwards it holds what it held.

    Layers put new tensors in the place of the old ones (linear ones by observe.ObservedCache), so
    that keeping these is enough. Cropping is not: a full sliding window has dropped what it would
    need, and a state knows no way back.
    """
    before = [{name: _kept(value) for name, value in vars(layer).items()} for layer in cache.layers]
    try:
        yield
    finally:
        for layer, held in zip(cache.layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(held)


def _kept(value: Any) -> Any:
    """What a layer will put nothing else into: containers are copied, tensors are not."""
    return copy(value) if isinstance(value, dict | list) else value
