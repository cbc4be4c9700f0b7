"""What can be known of heads before any prompt, from the model or from its profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines.base import PromptView, watched
from hkvprof.heads import HeadType
from hkvprof.models.attention import AttentionCall
from hkvprof.models.calls import last_row_only, with_cache
from hkvprof.profile.record import Profile

DISTINCT, REPEATS = 256, 4
"""RazorAttention repeats 2500 tokens four times; fewer here, as vocabularies and limits allow."""

AT = 0.2
"""Kept share at which a profile is asked what heads lose."""


@dataclass(frozen=True)
class Habits:
    """What every KV head does on repeated text: the most of its query heads, [layers, kv_heads].

    `echo` and `induction`: attention to earlier occurrences of the same token, and to what followed
    them.
    """

    echo: Float[Tensor, "layers kv_heads"]
    induction: Float[Tensor, "layers kv_heads"]


def habits(prompt: PromptView) -> Habits:
    """Watch the model read random tokens over and over; once per model."""
    found: Habits = prompt.offline("habits", lambda: _watch(prompt))
    return found


def _watch(prompt: PromptView) -> Habits:
    model, view = prompt.model, prompt.prefill.view
    once = _random_ids(prompt)
    ids = once.repeat(1, REPEATS)
    seen: dict[int, Tensor] = {}

    def watch(number: int, call: AttentionCall, output: Tensor) -> None:
        seen[number] = _layer(call, once.shape[1])

    with watched(model, view, watch) as cache:
        model(input_ids=ids, **with_cache(model, cache), **last_row_only(model))
    found = torch.stack([seen[number] for number in sorted(seen)], dim=1).cpu()
    return Habits(*found)


def _layer(call: AttentionCall, period: int) -> Float[Tensor, "2 kv_heads"]:
    """Echo and induction of one layer, one query head at a time."""
    query, key = call.query[0].float(), call.key[0].float()
    tokens = query.shape[1]
    rows = torch.arange(period, tokens, device=query.device)
    distance = rows[:, None] - torch.arange(tokens, device=query.device)[None]
    same = (distance > 0) & (distance % period == 0)
    after = (distance > 0) & ((distance + 1) % period == 0)
    group = len(query) // len(key)
    found = []
    for head, row in enumerate(query):
        logits = row[rows] @ key[head // group].T * call.scaling
        weights = logits.masked_fill_(distance < 0, -torch.inf).softmax(dim=-1)
        found.append(torch.stack([(weights * mask).sum(-1).mean() for mask in (same, after)]))
    return torch.stack(found, dim=-1).view(2, len(key), group).amax(dim=-1)


def _random_ids(prompt: PromptView) -> Int[Tensor, "1 period"]:
    """Distinct ids of the vocabulary, none of them special or a place for vision."""
    config = prompt.prefill.view.text_config
    vision = prompt.prefill.view.fingerprint.vision.values()
    special: set[Any] = {number for number in vision if isinstance(number, int)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known = getattr(config, name, None)
        special |= set(known) if isinstance(known, list) else {known}
    size = int(config.vocab_size)
    usable = torch.tensor([number for number in range(size) if number not in special])
    limit = int(getattr(config, "max_position_embeddings", 0) or DISTINCT * REPEATS)
    period = min(DISTINCT, len(usable) // 2, limit // REPEATS)
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))
    return usable[order[:period]][None].to(prompt.device)


def static_loss(profile: Profile) -> NDArray[np.float32]:
    """What every head loses when it is static at 20%, with its best pooling; [layers, kv_heads].

    At 5%, where most heads lose much, the order of heads says less. Raises UsageError where no
    losses were measured.
    """
    if len(profile.ratios) < 2:
        raise UsageError(
            "this method ranks heads by measured losses, and a profile of recipe 'paper' has none: "
            "calibrate with recipe 'measured'"
        )
    static = [strategy.head_type is HeadType.STATIC for strategy in profile.strategies]
    at = int(np.abs(profile.ratios - AT).argmin())
    least: NDArray[np.float32] = profile.loss_at(profile.usual_tokens)[static][..., at].min(axis=0)
    return least


def full_heads(prompt: PromptView, rank: list[int], local: int) -> tuple[set[int], list[int]]:
    """As many heads, in this order, as can be whole while the others hold `local` tokens.

    Returns their numbers (layer by layer), and how many tokens every head holds; what is left over
    goes to the others in equal parts.
    """
    heads = prompt.grid.total
    total = prompt.room * heads
    local = min(local, prompt.room)
    whole = (total - local * heads) // max(1, prompt.tokens - local)
    full = set(rank[:whole])
    left, others = total - whole * prompt.tokens, heads - whole
    share, more = divmod(left, others)
    counts, streaming = [], 0
    for head in range(heads):
        if head in full:
            counts.append(prompt.tokens)
        else:
            counts.append(share + (streaming < more))
            streaming += 1
    return full, counts
