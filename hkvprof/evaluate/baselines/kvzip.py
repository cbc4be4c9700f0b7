"""KVzip: what a model needs to repeat its context."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.errors import ModelError
from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline, watched
from hkvprof.evaluate.baselines.scores import (
    SINKS,
    best_of_all,
    keep_marked,
    with_recent,
    with_sinks,
)
from hkvprof.models.attention import AttentionCall
from hkvprof.models.calls import last_row_only, with_cache

CHUNK = 1024
"""Tokens repeated at a time (2048 as published)."""
LEAD = 8
"""Tokens of the chunk before that a later chunk's instruction ends with."""
RECENT = 4
FIRST = "Repeat the previous context exactly."
LATER = "Repeat the part of the previous context exactly, starting with"


@baseline("kvzip", "KVzip", "arXiv 2505.23416")
def kvzip(prompt: PromptView) -> Selection:
    """The largest attention a token gets while the model is made to repeat its chunk.

    One threshold over all layers and heads; the first 4 tokens always stay, and so do the last 4
    (not in the paper: it serves the method better here). The repetition is fed as embeddings,
    vision tokens included, at positions that continue the prompt's (for models that add vision
    features in deeper layers, without those). The seconds of this pass count.
    """
    scores = torch.stack(prompt.remember("kvzip", lambda: repeat_scores(prompt)))
    forced = with_recent(prompt, with_sinks(prompt, scores), RECENT)
    return keep_marked(prompt, list(best_of_all(forced, prompt.room * prompt.grid.total, safe=1)))


def repeat_scores(prompt: PromptView) -> list[Float[Tensor, "kv_heads tokens"]]:
    """Maximum over the repeating rows and the group, per chunk of the context."""
    prefill, model = prompt.prefill, prompt.model
    context = prefill.decoder_input.embeddings
    if context is None:
        raise ModelError("kvzip needs the embeddings of the prompt: capture it with hkvprof")
    first, later, end = _instructions(prompt)
    scores = [
        layer.key.new_zeros(layer.key.shape[:2], dtype=torch.float32) for layer in prompt.layers
    ]
    begin, stop = 0, 0

    def watch(number: int, call: AttentionCall, output: Tensor) -> None:
        part = _attention(call, begin, stop, prompt.tokens)
        scores[number][:, begin:stop] = part

    with watched(model, prefill.view, watch) as cache:
        for layer, call in zip(cache.covered, prefill.calls, strict=True):
            layer.update(call.key, call.value)
        embed = model.get_input_embeddings()
        for begin in range(0, prompt.tokens, CHUNK):
            stop = min(begin + CHUNK, prompt.tokens)
            lead = context[:, max(0, begin - LEAD) : begin]
            words = [embed(later if begin else first), lead, embed(end)]
            fed = torch.cat([*(w.to(context) for w in words), context[:, begin:stop]], dim=1)
            prefill.restore(model)
            model(inputs_embeds=fed, **with_cache(model, cache), **last_row_only(model))
            cache.crop(-fed.shape[1])
    return scores


def _attention(
    call: AttentionCall, begin: int, stop: int, tokens: int
) -> Float[Tensor, "kv_heads chunk"]:
    """As published, among sinks, the chunk and what this pass fed; one query head at a time."""
    query, key = call.query[0].float(), call.key[0].float()
    fed = query.shape[1]
    sinks = min(SINKS, begin)
    seen = torch.cat([key[:, :sinks], key[:, begin:stop], key[:, tokens:]], dim=1)
    # The row before a token is what predicts it.
    rows = slice(max(0, fed - (stop - begin) - 1), fed)
    future = torch.ones(fed, fed, dtype=torch.bool, device=key.device).triu(1)[rows]
    future = torch.nn.functional.pad(future, (seen.shape[1] - fed, 0))
    group = len(query) // len(key)
    best = key.new_zeros(len(key), stop - begin)
    for head, row in enumerate(query):
        logits = row[rows] @ seen[head // group].T * call.scaling
        weights = logits.masked_fill_(future, -torch.inf).softmax(dim=-1)
        mine = best[head // group]
        torch.maximum(mine, weights[:, sinks : sinks + stop - begin].amax(dim=0), out=mine)
    return best


def _instructions(prompt: PromptView) -> tuple[Int[Tensor, "1 first"], ...]:
    """Token ids of the instruction for the first chunk, for later ones, and of what ends it.

    A prompt that ends with the opening of a reply is followed by a turn of its own, any other one
    (a context without question) goes on in its turn. Without tokenizer or chat template beside the
    weights, the context is repeated without being asked for.
    """
    tokenizer, switch, close = prompt.offline("kvzip turns", lambda: _turns(prompt.model))

    def ids(text: str) -> Tensor:
        numbers = tokenizer(text, add_special_tokens=False)["input_ids"] if tokenizer else []
        return torch.tensor([numbers], dtype=torch.long, device=prompt.device)

    end = ids(close)
    closed = bool(end.shape[1]) and torch.equal(prompt.prefill.ids[:, -end.shape[1] :], end)
    opening = switch if closed else "\n\n"
    return ids(opening + FIRST), ids(opening + LATER), end


def _turns(model: Any) -> tuple[Any, str, str]:
    """The model's tokenizer, the text from a reply's end to the next user's words, and from there
    to the next reply."""
    from transformers import AutoTokenizer

    if not model.name_or_path:
        return None, "", ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None, "", ""
    for said in (_SAID, [[{"type": "text", "text": words}] for words in _SAID]):
        messages = [
            {"role": role, "content": words} for role, words in zip(_ROLES, said, strict=True)
        ]
        found = _between(tokenizer, messages)
        if found is not None:
            return tokenizer, *found
    return tokenizer, "\n\n", "\n"


_ROLES = ("user", "assistant", "user")
_SAID = ("Alpha", "Beta", "Gamma")


def _between(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, str] | None:
    """What a template puts after the reply and after the second question; None if it cannot."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        between, close = text.split(_SAID[1], 1)[1].split(_SAID[2], 1)
    except (TemplateError, TypeError, IndexError, ValueError):
        return None  # templates differ in whether they take strings or lists of parts
    return between, close
