"""What hkvprof relies on in transformers, asked one by one on stock models.

Each question raises MovedError with what moved. The cache layers here forget tokens, as compressed
ones do, so that what looks at stored tensors in place of the cache's answers shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from hkvprof.models.attention import AttentionCall, MarkedLayer, guarded, hooked_attention
from hkvprof.models.calls import NAMES, cache_keyword, cache_of, rope_holder, with_cache
from hkvprof.runtime.selfcheck.models import OFFSET, PROMPT, SCALING, Talk

FORGOTTEN = 7
"""Tokens that a spying layer drops after the prompt."""
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "use_cache")
"""Of `forward`, besides the cache."""


class MovedError(Exception):
    """The message names a part of transformers that is not as hkvprof knows it."""


class Spy(MarkedLayer):
    """A layer that writes down what it is asked, and the attention over the keys it gave out."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()
        self.fed: list[int] = []
        self.calls: list[AttentionCall] = []
        self._seen = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the stock layer, marked."""
        self._seen += key_states.shape[-2]
        self.fed.append(key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """The number of tokens seen so far."""
        self.asked.add("get_seq_length")
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Over the logical length."""
        self.asked.add("get_mask_sizes")
        return self._seen + query_length, 0

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Over what is stored, without the mask after the prompt."""
        _mask(call, (len(call.query), 1, call.query.shape[2], self._seen))
        self.calls.append(call)
        if len(self.calls) == 1:
            return call.dense()
        group = call.query.shape[1] // call.key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (call.key, call.value))
        found = torch.nn.functional.scaled_dot_product_attention(
            call.query, key, value, scale=call.scaling
        )
        return found.transpose(1, 2).contiguous(), None

    def forget(self) -> None:
        """Drop stored tokens, as compression does."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:, :, FORGOTTEN:], self.values[:, :, FORGOTTEN:]


def arguments_of_forward(model: Any) -> None:
    """Names of what `forward` takes."""
    found = list(inspect.signature(model.forward).parameters)
    name = f"{type(model).__name__}.forward"
    if not any(known in found for known in NAMES):
        raise MovedError(f"{name} takes no argument {' or '.join(NAMES)}, but {', '.join(found)}")
    gone = [known for known in ARGUMENTS if known not in found]
    if gone:
        raise MovedError(f"{name} takes no argument {', '.join(gone)}, but {', '.join(found)}")


def passes(model: Any, talk: Talk) -> None:
    """How a pass treats the cache and calls attention."""
    cache = _spying(model)
    spies: list[Spy] = cache.layers
    with hooked_attention(model), _no_strangers(model, spies):
        output = model(**talk.inputs, **with_cache(model, cache))
        _prompt(cache, talk)
        if cache_of(output) is not cache:
            raise MovedError("a model's output does not hold the cache that it was given")
        for spy in spies:
            spy.forget()
        step, after = talk.passes[0], PROMPT + talk.passes[0].shape[1]
        model(input_ids=step, attention_mask=talk.mask(after), **with_cache(model, cache))
    for name in ("get_seq_length", "get_mask_sizes"):
        if not all(name in spy.asked for spy in spies[:1]):
            raise MovedError(f"a cache layer's {name}() is not asked")
    _step(model, spies[0], talk)


def _spying(model: Any) -> Any:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [Spy() for _ in cache.layers]
    return cache


@contextmanager
def _no_strangers(model: Any, spies: list[Spy]) -> Iterator[None]:
    """Attention over keys that no layer gave out raises."""

    def stranger(module: Any) -> None:
        _require_fed(spies[:1])
        raise MovedError("attention functions do not get the keys that the cache's update() gave")

    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    if not modules:
        raise MovedError("attention modules have no layer_idx or no k_proj")
    with guarded(modules, stranger):
        yield


def _require_fed(spies: list[Spy]) -> None:
    if any(len(spy.fed) != len(spies[0].fed) for spy in spies[1:]) or not spies[0].fed:
        raise MovedError("the cache's update() is not called once a layer and pass")


def _prompt(cache: Any, talk: Talk) -> None:
    spies, (rows, tokens) = cache.layers, talk.inputs["input_ids"].shape
    _require_fed(spies)
    if any(len(spy.calls) != 1 for spy in spies):
        raise MovedError("attention functions registered by name are not called once a layer")
    call = spies[0].calls[0]
    if call.scaling != SCALING:
        raise MovedError("attention functions are told no scaling (argument `scaling`)")
    shape = (rows, 4, tokens, 8), (rows, 2, tokens, 8)
    found = (tuple(call.query.shape), tuple(call.key.shape))
    if found != shape:
        raise MovedError(f"queries and keys reach attention as {found}, expected {shape}")
    assert call.mask is not None
    last = call.mask[:, 0, -1]
    visible = last if last.dtype == torch.bool else last == 0
    if not torch.equal(visible, talk.inputs["attention_mask"].bool()):
        raise MovedError("the mask that reaches attention does not hide the padding, and only that")


def _mask(call: AttentionCall, wanted: tuple[int, ...]) -> None:
    found = None if call.mask is None else tuple(call.mask.shape)
    if found != wanted:
        raise MovedError(
            f"the mask that reaches attention has the shape {found}, expected {wanted}: [rows, 1, "
            "queries, positions as the cache's get_mask_sizes() says]"
        )


def _step(model: Any, spy: Spy, talk: Talk) -> None:
    """After the prompt: positions go on from the cache's length, whatever is stored."""
    call = spy.calls[1]
    stored = PROMPT - FORGOTTEN + 1
    if call.key.shape[2] != stored:
        raise MovedError(f"attention gets {call.key.shape[2]} keys, update() gave {stored}")
    ids = torch.cat([talk.inputs["input_ids"], talk.passes[0]], dim=1)
    whole = _spying(model)
    with hooked_attention(model):
        model(input_ids=ids, attention_mask=talk.mask(PROMPT + 1), **with_cache(model, whole))
    expected = whole.layers[0].calls[0].query[:, :, -1:]
    if not torch.allclose(call.query, expected, atol=1e-9):
        raise MovedError("positions do not go on from the cache's get_seq_length()")


def rows_of_a_cache(model: Any) -> None:
    """Calls that a cache hands on to its layers."""
    told: list[tuple[str, Any]] = []

    class Rows(DynamicLayer):
        def crop(self, tokens_to_remove: int) -> None:
            told.append(("crop", int(tokens_to_remove)))

        def reorder_cache(self, beam_idx: Tensor) -> None:
            told.append(("reorder_cache", beam_idx.tolist()))

        def batch_select_indices(self, indices: Tensor) -> None:
            told.append(("batch_select_indices", indices.tolist()))

        def batch_repeat_interleave(self, repeats: int) -> None:
            told.append(("batch_repeat_interleave", repeats))

    cache = DynamicCache(config=model.config)
    cache.layers = [Rows()]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    wanted = [
        ("reorder_cache", [1, 0]), ("batch_select_indices", [1]), ("batch_repeat_interleave", 2),
        ("crop", -2),
    ]  # fmt: skip
    missing = [name for name, value in wanted if (name, value) not in told]
    if missing:
        raise MovedError(f"a cache does not hand {', '.join(missing)} on to its layers")


def generation(model: Any, talk: Talk) -> None:
    """What `generate` does with a cache, and where its configuration comes from."""
    prepare = getattr(model, "_prepare_generation_config", None)
    if prepare is None:
        raise MovedError("_prepare_generation_config is gone from generation models")
    config, *_ = prepare(None, use_cache=False, max_new_tokens=5)
    if (config.use_cache, config.max_new_tokens) != (False, 5):
        raise MovedError("_prepare_generation_config does not give the effective configuration")
    cache = _spying(model)
    with hooked_attention(model):
        output = model.generate(
            **talk.inputs, generation_config=greedy(3), **with_cache(model, cache)
        )
    spy = cache.layers[0]
    if not spy.fed:
        raise MovedError(
            f"generate() does not use the cache that it is given as {cache_keyword(model.forward)}"
        )
    if spy.fed != [PROMPT, 1, 1]:
        raise MovedError(f"generate() feeds passes of {spy.fed} tokens, expected {[PROMPT, 1, 1]}")
    if cache_of(output) is not cache:
        raise MovedError("the output of generate() does not hold the cache that it was given")


def greedy(steps: int) -> GenerationConfig:
    """Exactly so many tokens, with the logits of every pass."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=steps, min_new_tokens=steps, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, use_cache=True,
    )  # fmt: skip


def offsets(model: Any, talk: Talk) -> None:
    """Where Qwen-VL models keep the M-RoPE offset between passes."""
    holder = rope_holder(model)
    if holder is None:
        raise MovedError(f"{type(model).__name__}.model has no rope_deltas")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model(**talk.inputs, **with_cache(model, cache))
    found = holder.rope_deltas
    if found is None or found.flatten().tolist() != [OFFSET]:
        raise MovedError(f"rope_deltas after a prompt with an image is {found}, expected {OFFSET}")
    logits = []
    for shift in (0, 3):
        holder.rope_deltas = found + shift
        step = model(input_ids=talk.passes[0], **with_cache(model, cache))
        logits.append(step.logits)
        cache.crop(-1)
    if torch.equal(*logits):
        raise MovedError("rope_deltas on the model do not shift the positions of later passes")
