"""Conversations with a profile applied, called in every way, against the stock model's logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.models.calls import NAMES, cache_keyword, with_cache
from hkvprof.runtime.selfcheck.models import KEPT, PROMPT, Talk, uniform
from hkvprof.runtime.selfcheck.probes import MovedError, greedy

Apply = Callable[..., Any]
Call = Callable[[Any, dict[str, Tensor], Any], Any]
"""One pass of a model over inputs, with a cache."""
STEPS = 3
_NEAR = 1e-5
"""Relative; norms and softmax run in single precision, whatever the model's."""


def by_keyword(model: Any, inputs: dict[str, Tensor], cache: Any) -> Any:
    """Under the name that the release takes."""
    return model(**inputs, **with_cache(model, cache))


def by_other_name(model: Any, inputs: dict[str, Tensor], cache: Any) -> Any:
    """Under the name that other releases take."""
    other = next(name for name in NAMES if name != cache_keyword(model.forward))
    return model(**inputs, **{other: cache})


def by_position(model: Any, inputs: dict[str, Tensor], cache: Any) -> Any:
    """Every argument up to the cache by its place."""
    names = list(inspect.signature(model.forward).parameters)
    given = {**inputs, **with_cache(model, cache)}
    args = [
        given.pop(name, None) for name in names[: names.index(cache_keyword(model.forward)) + 1]
    ]
    return model(*args, **given)


def by_parts(model: Any, talk: Talk, cache: Any, call: Call = by_keyword) -> Iterator[Tensor]:
    """A talk in a loop of one's own: the last logits [rows, vocabulary] of each pass."""
    yield call(model, talk.inputs, cache).logits[:, -1]
    seen = PROMPT
    for ids in talk.passes:
        seen += ids.shape[1]
        # Qwen-VL takes a mask of all positions for a pass over them all.
        mask = {"attention_mask": talk.mask(seen)} if talk.is_padded else {}
        yield call(model, {"input_ids": ids, **mask}, cache).logits[:, -1]


def generated(model: Any, talk: Talk, cache: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Two turns of `generate` (one without a cache): tokens [rows, all], logits of each pass."""
    own = {} if cache is None else with_cache(model, cache)
    first = model.generate(**talk.inputs, **own, generation_config=greedy(STEPS))
    if cache is None:
        return first.sequences, list(first.logits)
    ids = torch.cat([first.sequences, *talk.passes], dim=1)
    mask = talk.mask(ids.shape[1])
    then = model.generate(
        input_ids=ids, attention_mask=mask, **own, generation_config=greedy(STEPS)
    )
    return then.sequences, [*first.logits, *then.logits]


def kept_whole(apply: Apply, model: Any, talk: Talk) -> None:
    """With everything kept, nothing changes, however the model is called."""
    expected = list(by_parts(model, talk, _stock(model)))
    tokens, turns = generated(model, talk, _stock(model))
    alone, logits = generated(model, talk)
    with apply(model, uniform(model), budget=1.0, min_tokens=1) as handle:
        for call in (by_keyword, by_position, by_other_name):
            found = list(by_parts(model, talk, handle.new_cache(), call))
            _same(f"{_name(call)}, everything kept", expected, found)
        found_tokens, found_turns = generated(model, talk, handle.new_cache())
        _same("two turns of generate(), everything kept", turns, found_turns, tokens, found_tokens)
        found_alone, found_logits = generated(model, talk)
        _same("generate(), everything kept", logits, found_logits, alone, found_alone)
        if handle.receipt().layers[0].state != "dense":
            raise MovedError("the cache that generate() used is not the one that hkvprof made")


def interleaved(apply: Apply, model: Any, talks: Sequence[Talk]) -> None:
    """Conversations that take turns on one model do not disturb each other."""
    expected = [list(by_parts(model, talk, _stock(model))) for talk in talks]
    with apply(model, uniform(model), budget=1.0, min_tokens=1) as handle:
        running = [by_parts(model, talk, handle.new_cache()) for talk in talks]
        found = [list(logits) for logits in zip(*zip(*running, strict=True), strict=True)]
    for one, other in zip(expected, found, strict=True):
        _same("two conversations by turns (rope_deltas)", one, other)


def compressed(apply: Apply, model: Any, talk: Talk, offset: int | None) -> None:
    """A small budget: attention over what is kept, at the positions of the whole prompt.

    `offset` is what the prompt's images add to M-RoPE positions; None for models without.
    """
    with apply(model, uniform(model), budget=KEPT, min_tokens=1) as handle:
        cache = handle.new_cache()
        found = by_parts(model, talk, cache)
        logits = [next(found)]
        kept = _resident(cache)
        logits += found
        receipt = cache.receipt()
        tokens, turns = generated(model, talk, handle.new_cache())
        replayed = list(by_parts(model, _said(talk, tokens), handle.new_cache()))
    if receipt.compressed_layers != 2 or not receipt.resident_share < 0.8:
        raise MovedError(f"nothing is compressed at a budget of {KEPT} tokens of {PROMPT}")
    expected = list(by_parts(model, talk, _stock(model)))[:1]
    expected += _over(model, talk, kept, offset)
    _same(f"a budget of {KEPT} tokens of {PROMPT}", expected, logits)
    _same(f"generate() with a budget of {KEPT} tokens", replayed, turns)


def _resident(cache: Any) -> Any:
    """A stock cache of the keys and values that a compressed one holds."""
    kept = DynamicCache()
    for number, layer in enumerate(cache.covered):
        if layer.ragged is None:
            raise MovedError(
                "layers keep their dense keys: attention does not pass through hkvprof"
            )
        storage = layer.ragged.storage
        segments = range(storage.segments)
        keys = torch.stack([storage.keys(s) for s in segments])[None]
        kept.update(keys, torch.stack([storage.values(s) for s in segments])[None], number)
    return kept


def _over(model: Any, talk: Talk, kept: Any, offset: int | None) -> Iterator[Tensor]:
    """The passes after the prompt on a stock model and cache, positions told."""
    seen = PROMPT
    for ids in talk.passes:
        places = torch.arange(seen, seen + ids.shape[1])[None]
        if offset is not None:
            places = (places + offset).expand(3, 1, -1)
        seen += ids.shape[1]
        yield model(input_ids=ids, position_ids=places, **with_cache(model, kept)).logits[:, -1]


def _said(talk: Talk, tokens: Tensor) -> Talk:
    """The passes that two turns of `generate` took for `tokens`."""
    turn = sum(ids.shape[1] for ids in talk.passes)
    begin, end = PROMPT + STEPS - 1, PROMPT + STEPS + turn
    single = [tokens[:, i : i + 1] for i in range(PROMPT, begin)]
    single += [tokens[:, begin:end], *(tokens[:, i : i + 1] for i in range(end, end + STEPS - 1))]
    return Talk(talk.inputs, tuple(single))


def _stock(model: Any) -> Any:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _name(call: Call) -> str:
    return f"the cache given {call.__name__.replace('_', ' ')}"


def _same(
    what: str,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    tokens: Tensor | None = None,
    found_tokens: Tensor | None = None,
) -> None:
    if len(expected) != len(found):
        raise MovedError(f"{what}: {len(found)} passes in place of {len(expected)}")
    for number, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
        error = float((mine - theirs).abs().max() / mine.abs().max())
        if not error <= _NEAR:
            raise MovedError(f"{what}: logits of pass {number} differ by {error:.2g} (relative)")
    if tokens is not None and found_tokens is not None and not torch.equal(tokens, found_tokens):
        raise MovedError(f"{what}: other tokens than the unmodified model's")
