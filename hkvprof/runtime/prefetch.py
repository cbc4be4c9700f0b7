"""Selection for the next step while the device goes on with this one (after FreeKV, 2505.13109).

A head's hot set outlives a step, and queries turn slowly. So a step may attend at once to what the
last step's query selected, while this step's selection and its reads of host memory run aside,
under the rest of this layer and under the layers that follow. Where a head's query has turned too
far from the last one, that head selects before attention, as without prefetch: the correction.
Every head selects exactly once per step and with that step's query either way, so that its state
after a step is the same as without prefetch; only attention may see a state one step old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hkvprof.errors import UsageError
from hkvprof.runtime.copies import deep_copy
from hkvprof.runtime.kernels import Retrieval
from hkvprof.runtime.kernels.interface import device_integers


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


class InOrder:
    """One queue: what goes aside runs at once. For tests where there is no device."""

    def join(self) -> None:
        """There is nothing to wait for."""

    def aside(self, work: Callable[[], None]) -> None:
        """Now."""
        work()

    def uses(self, tensors: Sequence[Tensor]) -> None:
        """There is one queue alone."""


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
