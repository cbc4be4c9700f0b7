"""Decoding steps of a layer's dynamic heads: when they select, by what, and how it is booked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from hkvprof.runtime.copies import deep_copy
from hkvprof.runtime.host import DynamicHead
from hkvprof.runtime.kernels import DynamicSegment, Kernels, Retrieval
from hkvprof.runtime.kernels.reference import TorchKernels, TorchRetrieval
from hkvprof.runtime.options import Options
from hkvprof.runtime.prefetch import Prefetch, queues_for
from hkvprof.runtime.receipt import Fetches, LayerAccount
from hkvprof.runtime.storage import RaggedStorage


class Retriever:
    """Bound to the dynamic heads of one compression: make a new one when they are replaced.

    `rerank` says of every dynamic segment how many items more its index names; `steps` counts
    decoding steps: every `retrieve_every`-th of them selects.
    """

    def __init__(
        self,
        dynamic: Mapping[int, DynamicHead],
        rerank: Mapping[int, int],
        account: LayerAccount,
        options: Options,
        scaling: float,
        steps: int = 0,
    ) -> None:
        self.steps = steps
        self.prefetch: Prefetch | None = None
        self._dynamic, self._rerank, self._account = dynamic, rerank, account
        self._options, self._scaling = options, scaling
        self._bound: Retrieval | None = None

    def step(
        self,
        kernels: Kernels,
        storage: RaggedStorage,
        query: Float[Tensor, "segments group dim"],
        attend: Callable[[], Tensor],
    ) -> Tensor:
        """Let the heads fetch what the query asks for, and attend; what `attend` returns."""
        began = time.perf_counter()
        if self._bound is None:
            self._bound = self._bind(kernels, storage)
        selects = self.steps % self._options.retrieve_every == 0
        self.advance(1)
        if self.prefetch is not None:
            return self.prefetch.step(self._bound, query, attend)
        if selects:
            self._bound.step(query)
            if not storage.key.is_cuda:
                self._account.retrieval_seconds += time.perf_counter() - began
        return attend()

    def step_seeing(
        self,
        storage: RaggedStorage,
        query: Float[Tensor, "segments group dim"],
        hidden: Mapping[int, Bool[Tensor, " items"]],
    ) -> None:
        """Let the heads fetch what the query asks for of what it sees; `hidden` items per segment.

        In plain torch, and at once where others prefetch.
        """
        self.unbind()
        selects = self.steps % self._options.retrieve_every == 0
        self.advance(1)
        if not selects:
            return
        bound = self._bind(TorchKernels(), storage)
        assert isinstance(bound, TorchRetrieval)
        bound.step_seeing(query, [hidden[segment] for segment in self._dynamic])
        if self.prefetch is not None:
            self.prefetch.forget()

    def advance(self, count: int) -> None:
        """Book decoding steps, taken by the device (or, below 0, not taken)."""
        every = self._options.retrieve_every
        selections = -(-(self.steps + count) // every) + -self.steps // every
        self.steps += count
        for segment, head in self._dynamic.items():
            account = self._account.heads[segment]
            account.chunks_requested += selections * head.layout.hot
            account.bytes_moved += selections * self._key_bytes(segment)

    def __deepcopy__(self, memo: dict[int, Any]) -> Retriever:
        """Bound to the copies of its heads, at their next step."""
        self.join()
        return deep_copy(self, memo, _bound=None)

    def join(self) -> None:
        """Later work sees every selection that was begun."""
        if self.prefetch is not None:
            self.prefetch.queues.join()

    def unbind(self) -> None:
        """The storage's tensors were replaced."""
        self.join()
        self._bound = None

    def _key_bytes(self, segment: int) -> int:
        """Bytes of the exact keys that reranking reads from the host at every selection."""
        head = self._dynamic[segment]
        more = self._rerank[segment]
        if not more or head.layout.hot == head.layout.items:
            return 0
        return min(head.layout.items, head.layout.hot + more) * head.host.item_bytes // 2

    def _bind(self, kernels: Kernels, storage: RaggedStorage) -> Retrieval:
        options, before = self._options, self._account.fetches
        segments = [self._segment(number, storage) for number in self._dynamic]
        bound = kernels.bind(
            storage.key,
            storage.value,
            segments,
            self._scaling,
            options.smoothing,
            options.retrieve_every - 1,
            None if before is None else before.counts,
        )
        if before is None:
            accounts = [self._account.heads[segment] for segment in self._dynamic]
            sizes = [head.host.item_bytes for head in self._dynamic.values()]
            self._account.fetches = Fetches(bound.fetched, accounts, sizes)
        if options.prefetch is not None:
            self._prepare_prefetch(options.prefetch, storage, segments, bound)
        return bound

    def _segment(self, number: int, storage: RaggedStorage) -> DynamicSegment:
        head = self._dynamic[number]
        return DynamicSegment(
            segment=number,
            index=head.index,
            slots=head.slots,
            hot_score=head.hot_score,
            host=head.host.data,
            scale=head.host.scale,
            items_per_group=head.host.items_per_group,
            hot_start=storage.offsets[number] + head.hot_start,
            chunk=head.layout.chunk,
            items=head.layout.items,
            rerank=self._rerank[number],
        )

    def _prepare_prefetch(
        self,
        threshold: float,
        storage: RaggedStorage,
        segments: list[DynamicSegment],
        bound: Retrieval,
    ) -> None:
        device = storage.key.device
        if self.prefetch is None:
            self.prefetch = Prefetch(list(self._dynamic), threshold, queues_for(device), device)
        tensors = [storage.key, storage.value, bound.fetched, *bound.tensors]
        for one in segments:
            tensors += [one.slots, *one.index.tensors()]
            tensors += [] if one.hot_score is None else [one.hot_score]
        self.prefetch.queues.uses(tensors)
