"""What the runtime held and computed, pass by pass: copies taken while it works."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hkvprof.doctor.conversations import Patient, Script, play
from hkvprof.models.adapter import ModelView
from hkvprof.profile.costs import DynamicLayout
from hkvprof.profile.record import Profile
from hkvprof.runtime import CompressedCache, Handle, apply


@dataclass(frozen=True)
class Seen:
    """One attention call: layer `number` in the model's cache, `query` [rows, query_heads, new,
    dim], `key` and `value` as its cache returned them, `mask` as it came; `base()` is what the
    model would do."""

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    base: Callable[[], tuple[Tensor, Any]]


Watch = Callable[[Seen], tuple[Tensor, Any]]


@contextmanager
def watched_attention(view: ModelView, watch: Watch) -> Iterator[None]:
    """Within, covered layers' attention is `watch`'s answer, under any implementation's name.

    The layers are told by the number that each attention module itself uses (`layer_idx`), masks
    and everything else stay the model's own. Restored at exit.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = view.text_config._attn_implementation
    base = ALL_ATTENTION_FUNCTIONS[name]
    covered = {id(module) for module in view.attention}

    def attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if id(module) not in covered:  # the vision tower has its own way of calling
            return base(module, *args, **kwargs)
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        own = functools.partial(base, module, *args, **kwargs)
        return watch(Seen(module.layer_idx, query, key, value, mask, scale, own))

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS[name] is not base:  # somebody else had set it the same way
            ALL_ATTENTION_FUNCTIONS[name] = base


_KERNEL_EPS = 4 * torch.finfo(torch.float32).eps
"""What exponentials and sums of a kernel that computes in float32 add to rounding."""


@dataclass(frozen=True)
class Exact:
    """`output` [rows, new, query_heads, dim]; `size` [rows, new, query_heads] is the length that
    an attended value has on (weighted) average; `sharpness` the largest logit's magnitude."""

    output: Tensor
    size: Tensor
    sharpness: Tensor

    def error(self, found: Float[Tensor, "rows new query_heads dim"]) -> Tensor:
        """Distance of `found` from the output over the size of what was averaged."""
        distance = (found.double() - self.output).norm(dim=-1)
        return (distance / self.size.clamp(min=1e-30)).nan_to_num(torch.inf)

    def tolerance(self, dtype: torch.dtype) -> Tensor:
        """Error that rounding in `dtype` may cause: products and sums round, and an error of a
        logit becomes one of its weight."""
        return (torch.finfo(dtype).eps + _KERNEL_EPS) * (1 + self.sharpness)


def attend(
    query: Float[Tensor, "rows query_heads new dim"],
    key: Float[Tensor, "rows kv_heads tokens dim"],
    value: Float[Tensor, "rows kv_heads tokens dim"],
    visible: Bool[Tensor, "rows kv_heads new tokens"],
    scaling: float,
) -> Exact:
    """softmax(scaling * q k + mask) v, query head h reading KV head h // group."""
    rows, query_heads, new, dim = query.shape
    heads = key.shape[1]
    grouped = query.double().reshape(rows, heads, query_heads // heads, new, dim)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", grouped, key.double()) * scaling
    logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    weights = logits.softmax(dim=-1)
    output = torch.einsum("bhgnt,bhtd->bhgnd", weights, value.double())
    size = torch.einsum("bhgnt,bht->bhgn", weights, value.double().square().sum(-1)).sqrt()
    sharpness = logits.masked_fill(~visible[:, :, None], 0).abs().amax(-1)

    def by_position(x: Tensor) -> Tensor:
        return x.reshape(rows, query_heads, new, *x.shape[4:]).transpose(1, 2)

    return Exact(by_position(output), by_position(size), by_position(sharpness))


@dataclass(frozen=True)
class Segment:
    """One (row, KV head) as it lies on the device: `key`, `value` [resident, dim], of which the
    first `few` are what tokens of `bits` bits give back. A dynamic head has a layout and the item
    number of every hot slot."""

    key: Tensor
    value: Tensor
    layout: DynamicLayout | None = None
    slots: tuple[int, ...] = ()
    few: int = 0
    bits: int = 0


@dataclass(frozen=True)
class RecordedCall:
    """One attention call of a layer: its output [rows, new, query_heads, dim], the mask that it
    got, and the segments [row][head] that the layer held right after; None while it is dense."""

    output: Tensor
    mask: Tensor | None
    segments: list[list[Segment]] | None


@dataclass
class Recording:
    """A script on a compressed cache: calls by layer number, and the logits of every pass."""

    script: Script
    profile: Profile
    budget: float
    options: dict[str, Any]
    calls: dict[int, list[RecordedCall]] = field(default_factory=lambda: defaultdict(list))
    logits: list[Tensor] = field(default_factory=list)

    @property
    def compressed_layers(self) -> int:
        """Layers that were compressed at the end."""
        return sum(calls[-1].segments is not None for calls in self.calls.values())


Prelude = Callable[[Handle, CompressedCache], CompressedCache]
"""What happens before the script: given the handle and a fresh cache, the cache to use."""


def record(
    patient: Patient,
    profile: Profile,
    script: Script,
    budget: float,
    prelude: Prelude | None = None,
    **options: Any,
) -> Recording:
    """Play a script with `profile` applied; `options` go to `hkvprof.runtime.apply`."""
    made = Recording(script, profile, budget, options)
    with apply(patient.model, profile, budget=budget, min_tokens=1, **options) as handle:
        cache = handle.new_cache()
        if prelude is not None:
            cache = prelude(handle, cache)

        def watch(seen: Seen) -> tuple[Tensor, Any]:
            output, weights = seen.base()
            state = _segments(cache.layers[seen.number], seen.key.shape[0])
            made.calls[seen.number].append(RecordedCall(output.detach().clone(), seen.mask, state))
            return output, weights

        with watched_attention(patient.view, watch):
            made.logits = play(patient.model, script, cache)
    return made


def _segments(layer: Any, rows: int) -> list[list[Segment]] | None:
    if layer.ragged is None:
        return None
    heads = layer.ragged.storage.segments // rows
    return [[_segment(layer.ragged, row * heads + head) for head in range(heads)]
            for row in range(rows)]  # fmt: skip


def _segment(ragged: Any, number: int) -> Segment:
    key, value = (part.clone() for part in ragged.resident(number))
    head = ragged.dynamic.get(number)
    held = None if ragged.quantised is None else ragged.quantised.of_segment(number)
    made = Segment(key, value)
    if held is not None:
        made = replace(made, few=len(held.rows), bits=held.format.bits)
    if head is None:
        return made
    return replace(made, layout=head.layout, slots=tuple(head.slots.tolist()))
