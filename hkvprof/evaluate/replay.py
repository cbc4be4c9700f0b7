"""What a cache answers, and how far its distributions are from the full cache's.

The full cache's own greedy continuation is forced token by token on every method: distances are
then of the same text, and do not end where the first token differs. Where it would end its turn,
the end token is passed over, so that short answers too give enough tokens to judge by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.models.calls import with_cache

STEPS = 64
"""Forced tokens per question."""


@dataclass(frozen=True)
class Lead:
    """Tokens between the compressed prompt and the reply, fed in one pass or one by one."""

    ids: tuple[int, ...] = ()
    stepwise: bool = False

    def __bool__(self) -> bool:
        return bool(self.ids)


@dataclass(frozen=True)
class Distance:
    """Means over rows: KL(full || method) in nats, agreement on the likeliest token; and the mean
    negative log-likelihood of the full cache's reply, in nats per token."""

    kl: float
    agreement: float
    nll: float
    rows: int


@dataclass(frozen=True)
class Reference:
    """The full cache's continuation of one question.

    `forced` tokens are fed one after the other; `log_probs` are the distributions before the first
    of them and after each. `reply` are the tokens up to the end of the turn: the beginning of
    `forced`, then, where that is longer than `forced`, what came on. `ended`: by an end token.
    """

    forced: Int[Tensor, " steps"]
    log_probs: Float[Tensor, "rows vocabulary"]
    reply: tuple[int, ...]
    ended: int | None

    @property
    def judged(self) -> list[int]:
        """The reply as far as it was forced, with its end token: what likelihoods are taken of."""
        tokens = list(self.reply[: len(self.forced)])
        if self.ended is not None and len(self.reply) <= len(self.forced):
            tokens.append(self.ended)
        return tokens

    def distance(self, log_probs: Float[Tensor, "rows vocabulary"], begin: int) -> Distance:
        """That of a method's distributions; rows before `begin` are dense for every method."""
        full = self.log_probs
        kl = (full.exp() * (full - log_probs)).sum(-1)[begin:]
        agreement = (full.argmax(-1) == log_probs.argmax(-1))[begin:]
        target = torch.tensor(self.judged, device=log_probs.device)
        nll = -log_probs[: len(target)].gather(-1, target[:, None])
        return Distance(
            float(kl.mean()), float(agreement.float().mean()), float(nll.mean()), len(kl)
        )

    def left_by(self, log_probs: Float[Tensor, "rows vocabulary"]) -> int | None:
        """The row at which a method's greedy reply leaves the full cache's; None if it never does
        within the forced tokens, and these hold the whole reply."""
        said = [int(token) for token in log_probs.argmax(-1)]
        left = next((i for i, token in enumerate(self.judged) if said[i] != token), None)
        if left is None and len(self.reply) > len(self.forced):
            return len(self.forced)  # what comes after was not forced
        return left


def end_tokens(model: Any, processor: Any) -> frozenset[int]:
    """Tokens that end a turn."""
    config = getattr(model.generation_config, "eos_token_id", None)
    ends = config if isinstance(config, list) else [config]
    return frozenset(e for e in [*ends, processor.tokenizer.eos_token_id] if e is not None)


@torch.no_grad()
def refer(
    model: Any,
    cache: Any,
    first: Float[Tensor, " vocabulary"] | None,
    lead: Lead,
    ends: frozenset[int],
    steps: int,
    max_new_tokens: int,
) -> Reference:
    """Let the full cache continue; `first` are the logits that its prompt ended with (no lead)."""
    logits = _open(model, cache, first, lead)
    stop = torch.tensor(sorted(ends), device=logits.device)
    rows, forced, reply, ended = [logits], [], [], None
    for step in range(max(steps, max_new_tokens)):
        token = int(logits.argmax())
        if ended is None and token in ends:
            ended = token
        if step >= steps and ended is not None:
            break
        passed = logits.index_fill(0, stop, -torch.inf)
        token = int(passed.argmax())
        if ended is None:
            reply.append(token)
        logits = _feed(model, cache, [token])[-1]
        if step < steps:
            forced.append(token)
            rows.append(logits)
    if ended is None and len(reply) == steps and int(logits.argmax()) in ends:
        ended = int(logits.argmax())
    log_probs = torch.stack(rows).float().log_softmax(-1)
    return Reference(torch.tensor(forced, device=logits.device), log_probs, tuple(reply), ended)


@torch.no_grad()
def replay(
    model: Any,
    cache: Any,
    first: Float[Tensor, " vocabulary"] | None,
    lead: Lead,
    reference: Reference,
    stepwise: bool,
) -> tuple[Distance, int | None]:
    """Force the reference on a cache: the distance, and the row at which its own greedy reply would
    leave the full cache's (`Reference.left_by`).

    `stepwise` feeds single tokens, as decoding does; caches that fetch nothing give the same in
    one pass.
    """
    forced = [int(token) for token in reference.forced]
    log_probs = force(model, cache, first, lead, forced, stepwise)
    return reference.distance(log_probs, 0 if lead else 1), reference.left_by(log_probs)


@torch.no_grad()
def refer_to(
    model: Any,
    cache: Any,
    first: Float[Tensor, " vocabulary"] | None,
    lead: Lead,
    tokens: Sequence[int],
) -> Reference:
    """The full cache's distributions while given tokens, which it need not have chosen, follow."""
    log_probs = force(model, cache, first, lead, list(tokens), stepwise=False)
    return Reference(torch.tensor(tokens, device=log_probs.device), log_probs, tuple(tokens), None)


@torch.no_grad()
def force(
    model: Any, cache: Any, first: Tensor | None, lead: Lead, forced: list[int], stepwise: bool
) -> Float[Tensor, "rows vocabulary"]:
    """Distributions before the first of the forced tokens and after each."""
    opening = _open(model, cache, first, lead)[None]
    passes = [[token] for token in forced] if stepwise else [forced]
    rows = torch.cat([opening, *(_feed(model, cache, ids) for ids in passes)])
    return rows.float().log_softmax(-1)


@torch.no_grad()
def answer(
    model: Any,
    cache: Any,
    first: Float[Tensor, " vocabulary"] | None,
    lead: Lead,
    ends: frozenset[int],
    max_new_tokens: int,
) -> tuple[int, ...]:
    """Greedy decoding, without the end token."""
    logits = _open(model, cache, first, lead)
    reply: list[int] = []
    while True:
        token = int(logits.argmax())
        if token in ends or len(reply) == max_new_tokens:
            return tuple(reply)
        reply.append(token)
        if len(reply) < max_new_tokens:
            logits = _feed(model, cache, [token])[-1]


def _open(model: Any, cache: Any, first: Tensor | None, lead: Lead) -> Tensor:
    """Logits from which the reply's first token is chosen, [vocabulary]."""
    if lead:
        passes = [[token] for token in lead.ids] if lead.stepwise else [list(lead.ids)]
        return [_feed(model, cache, ids) for ids in passes][-1][-1]
    assert first is not None, "a prompt without a lead needs its last logits"
    return first


def _feed(model: Any, cache: Any, ids: list[int]) -> Float[Tensor, "tokens vocabulary"]:
    tokens = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=tokens, **with_cache(model, cache)).logits[0]
    return logits
