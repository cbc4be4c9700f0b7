"""Decoding steps of a layer's dynamic heads: when they select, by what, and how it is booked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hkvprof.errors import UsageError
from hkvprof.runtime.accounts import Fetches, LayerAccount
from hkvprof.runtime.copies import deep_copy
from hkvprof.runtime.kernels import DynamicSegment, Kernels, QuantisedRows, Retrieval
from hkvprof.runtime.kernels.interface import device_integers
from hkvprof.runtime.kernels.reference import TorchKernels, TorchRetrieval
from hkvprof.runtime.options import Options
from hkvprof.runtime.storage import DynamicHead, RaggedStorage


class Queues(Protocol):
    """A main queue of device work, and a second one that may run beside it."""

    def join(self) -> None:
        """What is put into the main queue from now on waits for all that went aside."""
        ...

    def aside(self, work: Callable[[], None]) -> None:
        """Put work into the second queue, behind what the main queue holds so far."""
        ...

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """The second queue works on these: their memory is not reused before it is done."""
        ...


class CudaQueues:
    """The current stream, and one stream per device that all layers share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = _side_stream(device)
        self._done = torch.cuda.Event()

    def join(self) -> None:
        """By an event: the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def aside(self, work: Callable[[], None]) -> None:
        """On the side stream."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            work()
            self._done.record(self._side)

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """Told to the caching allocator; host memory is not its own."""
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(self._side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def queues_for(device: torch.device) -> Queues:
    """Both queues of a CUDA device. Raises UsageError for any other."""
    if device.type != "cuda":
        raise UsageError(
            f"prefetch overlaps reads of host memory with computation on a CUDA device; this model "
            f"is on {device.type}, where nothing would overlap and attention would only see an "
            "older selection: leave prefetch out"
        )
    return CudaQueues(device)


class Prefetch:
    """A layer's steps with prefetch. `threshold` is the cosine below which a head is corrected.

    The cosine is that of a head's query to its query one step before, mean over the group (NaN:
    corrected).
    """

    def __init__(
        self, segments: Sequence[int], threshold: float, queues: Queues, device: torch.device
    ) -> None:
        self.queues = queues
        self.corrected = torch.zeros(len(segments), dtype=torch.int64, device=device)
        """Corrections so far per dynamic head, counted on the device."""
        self.steps = 0
        self._threshold = threshold
        self._segments = device_integers(list(segments), device)
        self._turned = torch.empty(len(segments), dtype=torch.bool, device=device)
        self._rest = torch.empty_like(self._turned)
        self._last: Tensor | None = None

    def step(
        self,
        retrieval: Retrieval,
        query: Float[Tensor, "segments group dim"],
        attend: Callable[[], Tensor],
    ) -> Tensor:
        """Correct, attend, and select for the next step aside; what `attend` returned.

        `query` may be overwritten by the caller afterwards: a copy is kept.
        """
        self.steps += 1
        self.queues.join()
        if self._last is None:
            retrieval.step(query)
            self._last = query.clone()
            self.queues.uses((self._last, self._turned, self._rest))
            return attend()
        torch.logical_not(self._close(query), out=self._turned)
        torch.logical_not(self._turned, out=self._rest)
        self.corrected += self._turned
        retrieval.step_some(query, self._turned)
        out = attend()
        self._last.copy_(query)
        self.queues.aside(partial(retrieval.step_some, self._last, self._rest))
        return out

    def forget(self) -> None:
        """The heads selected by another way: the next step selects before it attends."""
        self._last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Prefetch:
        made = deep_copy(self, memo, [self.queues])
        if made._last is not None:
            made.queues.uses((made._last, made._turned, made._rest))
        return made

    def _close(self, query: Float[Tensor, "segments group dim"]) -> Bool[Tensor, " heads"]:
        assert self._last is not None
        cosine = F.cosine_similarity(query.float(), self._last.float(), dim=-1).mean(dim=-1)
        return cosine.index_select(0, self._segments) >= self._threshold


class Retriever:
    """Bound to the dynamic heads of one compression: make a new one when they are replaced."""

    def __init__(
        self,
        dynamic: Mapping[int, DynamicHead],
        account: LayerAccount,
        options: Options,
        scaling: float,
    ) -> None:
        self.prefetch: Prefetch | None = None
        self._dynamic, self._account = dynamic, account
        self._options, self._scaling = options, scaling
        self._bound: Retrieval | None = None

    def step(
        self,
        kernels: Kernels,
        storage: RaggedStorage,
        quantised: QuantisedRows | None,
        query: Float[Tensor, "segments group dim"],
        attend: Callable[[], Tensor],
    ) -> Tensor:
        """Let the heads fetch what the query asks for, and attend; what `attend` returns."""
        began = time.perf_counter()
        if self._bound is None:
            self._bound = self._bind(kernels, storage, quantised)
        self.advance(1)
        if self.prefetch is not None:
            return self.prefetch.step(self._bound, query, attend)
        self._bound.step(query)
        if not storage.key.is_cuda:
            self._account.retrieval_seconds += time.perf_counter() - began
        return attend()

    def step_seeing(
        self,
        storage: RaggedStorage,
        quantised: QuantisedRows | None,
        query: Float[Tensor, "segments group dim"],
        hidden: Mapping[int, Bool[Tensor, " items"]],
    ) -> None:
        """Let the heads fetch what the query asks for of what it sees; `hidden` items per segment.

        In plain torch, and at once where others prefetch.
        """
        self.unbind()
        self.advance(1)
        bound = self._bind(TorchKernels(), storage, quantised)
        assert isinstance(bound, TorchRetrieval)
        bound.step_seeing(query, [hidden[segment] for segment in self._dynamic])
        if self.prefetch is not None:
            self.prefetch.forget()

    def advance(self, count: int) -> None:
        """Book decoding steps, taken by the device (or, below 0, not taken)."""
        for segment, head in self._dynamic.items():
            account = self._account.heads[segment]
            account.chunks_requested += count * head.layout.hot

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

    def _bind(
        self, kernels: Kernels, storage: RaggedStorage, quantised: QuantisedRows | None
    ) -> Retrieval:
        options, before = self._options, self._account.fetches
        segments = [
            head.described(
                number,
                storage.offsets[number],
                None if quantised is None else quantised.of_segment(number),
            )
            for number, head in self._dynamic.items()
        ]
        bound = kernels.bind(
            storage.key,
            storage.value,
            segments,
            self._scaling,
            options.smoothing,
            () if before is None else before.counts,
        )
        if before is None:
            accounts = [self._account.heads[segment] for segment in self._dynamic]
            sizes = [head.host.item_bytes for head in self._dynamic.values()]
            keys = [head.rerank_bytes for head in self._dynamic.values()]
            counts = (bound.fetched, bound.reads, bound.most)
            self._account.fetches = Fetches(counts, accounts, sizes, keys)
        if options.prefetch is not None:
            self._prepare_prefetch(options.prefetch, storage, segments, bound)
        return bound

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
        tensors = [storage.key, storage.value, *bound.tensors]
        tensors += [bound.fetched, bound.reads, bound.most]
        for one in segments:
            tensors += [] if one.held is None else [one.held.rows, one.held.mean]
            tensors += [one.slots, *one.index.tensors()]
            tensors += [] if one.hot_score is None else [one.hot_score]
        self.prefetch.queues.uses(tensors)
