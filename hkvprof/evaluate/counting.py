"""Bytes as a comparison counts them, where a cache simulates another format.

Methods that code keys and values in few bits hold them decoded here, and a model that computes in
float32 holds 4 bytes where one that is served holds 2. What counts is what the format takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hkvprof.evaluate.prefill import Prefill
from hkvprof.heads import EXACT_BITS, HeadType, KeepRule, Strategy
from hkvprof.profile.costs import (
    QUANTISED_END_BYTES,
    dynamic_bytes,
    dynamic_layout,
    static_bytes,
    static_layout,
)
from hkvprof.runtime import CompressedCache, measure_storage
from hkvprof.runtime.plan import HeadPlan

SERVED_ITEMSIZE = 2
"""Bytes per element of keys and values in the dtypes that models are served in."""


@dataclass(frozen=True)
class CountedBytes:
    """Bytes of a cache: on the device by its receipt and by its tensors, on the host, dense."""

    resident: int
    storage: int
    host: int
    dense: int


def count_bytes(cache: CompressedCache, saved: int, itemsize: int) -> CountedBytes:
    """What a cache holds, less the `saved` bytes by which decoded rows exceed their format.

    `itemsize`: bytes that an element of keys and values counts, whatever it has.
    """
    receipt = cache.receipt()
    storage, _ = measure_storage(cache)
    device = sum(x.nbytes for x in _elements(cache, host=False))
    wide = next(_elements(cache, host=False)).element_size()
    less = saved + device - device * itemsize // wide
    hosted = sum(x.nbytes for x in _elements(cache, host=True))
    return CountedBytes(
        receipt.resident_bytes - less,
        storage - less,
        receipt.host_bytes - hosted + hosted * itemsize // wide,
        receipt.dense_bytes * itemsize // wide,
    )


def _elements(cache: CompressedCache, host: bool) -> Iterator[torch.Tensor]:
    """Tensors whose size goes with the dtype of keys and values: those, what was taken off those in
    fewer bits, and digests of keys."""
    for layer in cache.covered:
        ragged = layer.ragged
        if ragged is None:
            assert layer.keys is not None
            assert layer.values is not None
            yield from () if host else (layer.keys, layer.values)
            continue
        dtype = ragged.storage.key.dtype
        heads = ragged.dynamic.values()
        if host:
            stores = {id(head.host): head.host.data for head in heads}
            yield from (data for data in stores.values() if data.dtype == dtype)
            coders = {id(head.host): head.host.coder for head in heads}
            yield from (coder.mean for coder in coders.values() if coder is not None)
            continue
        held = vars(ragged.storage).values()
        yield from (x for x in held if isinstance(x, torch.Tensor) and x.dtype == dtype)
        if ragged.quantised is not None:
            yield ragged.quantised.mean
        digests = [tensor for head in heads for tensor in head.index.tensors()]
        yield from (tensor for tensor in digests if tensor.dtype == dtype)


@dataclass(frozen=True)
class Widened:
    """Makes plans for elements of `itemsize` bytes hold the same tokens with `wide` bytes each."""

    keep: KeepRule
    tokens: int
    head_dim: int
    slot_bytes: int
    itemsize: int
    wide: int

    @classmethod
    def to_fit(cls, prefill: Prefill, keep: KeepRule, slot_bytes: int, itemsize: int) -> Widened:
        """For plans of a captured prompt, whose elements count `itemsize` bytes."""
        key = prefill.calls[0].key
        return cls(keep, prefill.tokens, key.shape[-1], slot_bytes, itemsize, key.element_size())

    def plan(self, plan: HeadPlan) -> HeadPlan:
        """The plan under which a head of wide elements keeps the tokens that this one means."""
        strategy, fixed = plan.strategy, (self.keep, self.head_dim)
        if self.itemsize == self.wide or plan.ratio >= 1:
            return plan
        if strategy.head_type is HeadType.STATIC:
            return self._static(plan)
        layout = dynamic_layout(
            strategy, plan.ratio, self.tokens, *fixed, self.itemsize, self.slot_bytes
        )
        if layout is None:  # too short for its index: the runtime prunes it (packing)
            return HeadPlan(replace(strategy, head_type=HeadType.STATIC, pool=1), plan.ratio)
        held = dynamic_bytes(strategy, layout, self.head_dim, self.wide, self.slot_bytes)
        return replace(self._holding(strategy, held), fresh=plan.fresh)

    def _static(self, plan: HeadPlan) -> HeadPlan:
        """Where all tokens are exact, they are as many at the same ratio."""
        strategy = plan.strategy
        if strategy.resident_bits == EXACT_BITS:
            return plan
        fixed = self.tokens, self.keep, self.head_dim
        layout = static_layout(strategy, plan.ratio, *fixed, self.itemsize)
        return self._holding(strategy, static_bytes(strategy, layout, self.head_dim, self.wide))

    def _holding(self, strategy: Strategy, held: int) -> HeadPlan:
        """With room for so many bytes; those of a segment's ends come out of no share."""
        ends = 0 if strategy.resident_bits == EXACT_BITS else QUANTISED_END_BYTES
        unit = 2 * self.head_dim * self.wide
        return HeadPlan(strategy, (held - ends + 0.5) / (self.tokens * unit))
