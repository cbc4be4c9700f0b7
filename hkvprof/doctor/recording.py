"""What the runtime held and computed, pass by pass: copies taken while it works."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hkvprof.artifact import Profile
from hkvprof.doctor.prompts import Patient
from hkvprof.doctor.script import Script, play
from hkvprof.doctor.seam import Seen, watched_attention
from hkvprof.policy.costs import DynamicLayout
from hkvprof.runtime import CompressedCache, Handle, apply


@dataclass(frozen=True)
class Segment:
    """One (row, KV head) as it lies on the device: `key`, `value` [resident, dim]. A dynamic head
    has a layout and the item number of every hot slot."""

    key: Tensor
    value: Tensor
    layout: DynamicLayout | None = None
    slots: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
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
    calls: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
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
            made.calls[seen.number].append(Call(output.detach().clone(), seen.mask, state))
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
    key, value = ragged.storage.keys(number).clone(), ragged.storage.values(number).clone()
    head = ragged.dynamic.get(number)
    if head is None:
        return Segment(key, value)
    return Segment(key, value, head.layout, tuple(head.slots.tolist()))
