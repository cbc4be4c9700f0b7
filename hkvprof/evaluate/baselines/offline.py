"""What can be known of heads before any prompt: how they look at repeated random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.evaluate.baselines.base import Prompt
from hkvprof.evaluate.baselines.passes import watched
from hkvprof.models.adapter import output_projection
from hkvprof.models.attention import AttentionCall
from hkvprof.models.forward import last_row_only

DISTINCT, REPEATS = 256, 4
"""RazorAttention repeats 2500 tokens four times; fewer here, as vocabularies and limits allow."""


@dataclass(frozen=True)
class Habits:
    """Of every KV head, the most of its group, [layers, kv_heads].

    `echo` and `induction`: attention to earlier occurrences of the same token, and to what followed
    them. `streaming`: relative change of the layer's output when the head sees sinks and recent
    tokens alone.
    """

    echo: Float[Tensor, "layers kv_heads"]
    induction: Float[Tensor, "layers kv_heads"]
    streaming: Float[Tensor, "layers kv_heads"]


def habits(prompt: Prompt, sinks: int, recent: int) -> Habits:
    """Watch the model read random tokens over and over; once per model."""
    return prompt.offline(f"habits {sinks} {recent}", lambda: _watch(prompt, sinks, recent))


def _watch(prompt: Prompt, sinks: int, recent: int) -> Habits:
    model, view = prompt.model, prompt.prefill.view
    once = _random_ids(prompt)
    ids = once.repeat(1, REPEATS)
    seen: dict[int, Tensor] = {}

    def watch(number: int, call: AttentionCall, output: Tensor) -> None:
        projection = output_projection(view.attention[number]).detach().float()
        seen[number] = _layer(call, output, projection, once.shape[1], sinks, recent)

    with watched(model, view, watch) as cache:
        model(input_ids=ids, past_key_values=cache, **last_row_only(model))
    found = torch.stack([seen[number] for number in sorted(seen)], dim=1).cpu()
    return Habits(*found)


def _layer(
    call: AttentionCall, output: Tensor, projection: Tensor, period: int, sinks: int, recent: int
) -> Float[Tensor, "3 kv_heads"]:
    """Echo, induction and streaming loss of one layer, one query head at a time."""
    query, key, value = call.query[0].float(), call.key[0].float(), call.value[0].float()
    tokens, dim = query.shape[1:]
    rows = torch.arange(period, tokens, device=query.device)
    place = torch.arange(tokens, device=query.device)[None]
    distance = rows[:, None] - place
    past = distance >= 0
    same = past & (distance > 0) & (distance % period == 0)
    after = past & (distance > 0) & ((distance + 1) % period == 0)
    near = past & ((distance < recent) | (place < sinks))
    norm = (output[0, period:].float().flatten(1) @ projection.T).norm(dim=-1).clamp(min=1e-12)
    group = len(query) // len(key)
    found = []
    for head, row in enumerate(query):
        logits = row[rows] @ key[head // group].T * call.scaling
        weights = logits.masked_fill(~past, -torch.inf).softmax(dim=-1)
        local = logits.masked_fill(~near, -torch.inf).softmax(dim=-1)
        change = (weights - local) @ value[head // group]
        columns = projection[:, head * dim : (head + 1) * dim]
        loss = ((change @ columns.T).norm(dim=-1) / norm).mean()
        echo, induction = ((weights * mask).sum(dim=-1).mean() for mask in (same, after))
        found.append(torch.stack([echo, induction, loss]))
    return torch.stack(found, dim=-1).view(3, len(key), group).amax(dim=-1)


def _random_ids(prompt: Prompt) -> Int[Tensor, "1 period"]:
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


def full_heads(prompt: Prompt, rank: list[int], local: int) -> tuple[set[int], list[int]]:
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
