"""Where a compressed layer's keys and values lie: flat on the device, and in chunks on the host.

All (batch row, KV head) segments of a layer lie in one [capacity, dim] tensor for K and one for V.
A segment holds the head's prompt tokens in any order (keys carry their positions), then generated
tokens, then slack. Segments grow together; growth copies the resident bytes once every few tokens.

A dynamic head's segment is laid out [sinks | recent | hot slots | tokens since]; its other tokens
are items in host memory, of which an index and a slot map stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.heads import EXACT_BITS
from hkvprof.profile.budgets import ANY
from hkvprof.profile.costs import DynamicLayout, candidates, read_bytes
from hkvprof.runtime.devices import SLABS, mark
from hkvprof.runtime.kernels.interface import DynamicSegment, Extents, Kernels, device_integers
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.selection.index import KeyIndex
from hkvprof.selection.residents import Residents

SLACK_SHARE = 1 / 32
MIN_SLACK = 4
ROW_BITS = 8
"""Of host items with host_dtype="int8"."""
AT_ONCE = 8192
"""Tokens that are quantised at a time: some 20 MiB of temporary memory at width 128."""
GROWTH = 1 / 8
"""Room for later items, as a share of those stored, when a store has to grow."""
_HOST = torch.device("cpu")
_TORCH = TorchKernels()


class RaggedStorage:
    """Segments in row-major order: segment = row * kv_heads + head."""

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "tokens dim"]],
        values: Sequence[Float[Tensor, "tokens dim"]],
    ) -> None:
        """Copy one [tokens, dim] tensor per segment, without slack."""
        self.lengths = [len(key) for key in keys]
        self.capacities = list(self.lengths)
        self.key = torch.cat(list(keys))
        self.value = torch.cat(list(values))
        self._locate()

    def _locate(self) -> None:
        """Offsets on the host; where segments start and end also on the device."""
        self.offsets = [0]
        for capacity in self.capacities[:-1]:
            self.offsets.append(self.offsets[-1] + capacity)
        ends = [o + n for o, n in zip(self.offsets, self.lengths, strict=True)]
        places = device_integers([self.offsets, ends], self.key.device, torch.int32)
        self.starts, self.ends = places
        self.longest = max(self.capacities)

    @property
    def segments(self) -> int:
        """Number of segments: rows times KV heads."""
        return len(self.lengths)

    @property
    def extents(self) -> Extents:
        """Where the segments lie now, for the kernels."""
        return Extents(self.offsets, self.lengths, self.longest, self.starts, self.ends)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one segment."""
        return self.key[:1].nbytes + self.value[:1].nbytes

    def keys(self, segment: int) -> Float[Tensor, "tokens dim"]:
        """View of a segment's keys."""
        start = self.offsets[segment]
        return self.key[start : start + self.lengths[segment]]

    def values(self, segment: int) -> Float[Tensor, "tokens dim"]:
        """View of a segment's values."""
        start = self.offsets[segment]
        return self.value[start : start + self.lengths[segment]]

    def append(
        self,
        key: Float[Tensor, "segments tokens dim"],
        value: Float[Tensor, "segments tokens dim"],
        spare: int,
        kernels: Kernels = _TORCH,
    ) -> None:
        """Write the same number of new tokens to the end of every segment.

        Where there is no room for them, slack is made too, for at most `spare` tokens more.
        """
        count = key.shape[1]
        if count > self.room:
            slack = max(MIN_SLACK, int(SLACK_SHARE * sum(self.lengths) / self.segments))
            self._grow(count + max(0, min(slack - 1, spare)))
        kernels.append(self.key, self.value, self.ends, key, value)
        self.advance(count)

    def advance(self, count: int) -> None:
        """Count tokens that the device has appended already (or, below 0, has not)."""
        self.lengths = [n + count for n in self.lengths]

    @property
    def room(self) -> int:
        """Tokens that every segment can take without growth."""
        return min(c - n for n, c in zip(self.lengths, self.capacities, strict=True))

    def reserve(self, count: int) -> bool:
        """Make room for `count` tokens at once; True when that replaced the tensors."""
        if count <= self.room:
            return False
        self._grow(count)
        return True

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens of every segment. Raises CompressionError beyond them."""
        if count > min(self.lengths):
            raise CompressionError(
                f"cannot remove {count} tokens from segments of {min(self.lengths)} and more"
            )
        self.lengths = [n - count for n in self.lengths]
        self.ends -= count

    def take(self, segments: Sequence[int]) -> RaggedStorage:
        """A copy holding the given segments (with repetition), without slack."""
        return RaggedStorage([self.keys(s) for s in segments], [self.values(s) for s in segments])

    def _grow(self, room: int) -> None:
        """New tensors in which every segment has room for that many more tokens."""
        old = (self.key, self.value, self.offsets)
        self.capacities = [n + room for n in self.lengths]
        total = sum(self.capacities)
        self.key = old[0].new_empty((total, old[0].shape[1]))
        self.value = old[1].new_empty((total, old[1].shape[1]))
        self._locate()
        for segment, length in enumerate(self.lengths):
            source = slice(old[2][segment], old[2][segment] + length)
            target = slice(self.offsets[segment], self.offsets[segment] + length)
            self.key[target] = old[0][source]
            self.value[target] = old[1][source]


@dataclass
class HostChunks:
    """Keys and values of a head's host items, K and V of an item adjacent.

    `data` [capacity, 2, chunk, dim], of which the first `items` are in use, in the K/V dtype; or,
    with `coder`, rows [capacity, chunk, row_bytes] in 8 bits, whose format and mean (of the items
    stored first, on the host) it names. Pinned where the device is CUDA, whose copies are done when
    `written` has passed. Stored items never change; a store that several batch rows share is copied
    before it grows.
    """

    data: Tensor
    coder: Residents | None
    items: int
    dtype: torch.dtype
    pinned: bool
    shared: bool = False
    written: torch.cuda.Event | None = None
    on_host = True

    @classmethod
    def store(
        cls,
        key: Float[Tensor, "items chunk dim"],
        value: Float[Tensor, "items chunk dim"],
        host_dtype: str = "same",
    ) -> HostChunks:
        """Copy to the host. Raises CompressionError when host memory cannot be had."""
        items, chunk, dim = key.shape
        pinned, coder = _pins(key), None
        shape: tuple[int, ...] = (items, 2, chunk, dim)
        kind = key.dtype
        if host_dtype == "int8":
            coder = Residents.around(key.flatten(0, 1), value.flatten(0, 1), ROW_BITS).on(_HOST)
            shape, kind = (items, chunk, coder.format.row_bytes), torch.uint8
        if pinned:  # growing copies all items, and pins as much again
            shape = (_with_room(items), *shape[1:])
        made = cls(_allocate(shape, kind, pinned), coder, items, key.dtype, pinned)
        made._write(0, key, value)
        return made

    @property
    def loses(self) -> bool:
        """Whether items are not exactly what was stored."""
        return self.coder is not None

    @property
    def chunk(self) -> int:
        """Tokens that an item holds."""
        return self.data.shape[-2]

    @property
    def item_bytes(self) -> int:
        """Host bytes of one item."""
        return self.data[:1].numel() * self.data.element_size()

    @property
    def nbytes(self) -> int:
        """Host bytes, room for later items included."""
        mean = 0 if self.coder is None else self.coder.mean.untyped_storage().nbytes()
        return self.data.nbytes + mean

    def append(
        self, key: Float[Tensor, "items chunk dim"], value: Float[Tensor, "items chunk dim"]
    ) -> HostChunks:
        """The store with more items; the same object unless it is shared or full."""
        self._settle()
        target, total = self, self.items + len(key)
        if self.shared or total > len(self.data):
            capacity = total if self.shared else _with_room(total)
            data = _allocate((capacity, *self.data.shape[1:]), self.data.dtype, self.pinned)
            data[: self.items] = self.data[: self.items]
            target = replace(self, data=data, shared=False)
        target._write(self.items, key, value)
        target.items = total
        return target

    def fetch(
        self, items: Int[Tensor, " n"], device: torch.device
    ) -> Float[Tensor, "n 2 chunk dim"]:
        """Chosen items on the device, in the K/V dtype."""
        return self._restored(self.stored(items, device))

    def stored(self, items: Int[Tensor, " n"], device: torch.device) -> Tensor:
        """Chosen items on the device as they are in `data`."""
        where = items.cpu()
        self._settle()
        return self.data[where].to(device, non_blocking=True)

    def everything(self, device: torch.device) -> Float[Tensor, "items 2 chunk dim"]:
        """All items on the device, in the K/V dtype."""
        return self._restored(self.data[: self.items].to(device))

    def _restored(self, data: Tensor) -> Tensor:
        return data if self.coder is None else self.coder.decode_items(data)

    def _settle(self) -> None:
        """Before the host itself reads: wait until what was stored is there."""
        if self.written is not None:
            self.written.synchronize()
            self.written = None

    def _write(self, start: int, key: Tensor, value: Tensor) -> None:
        room = self.data[start : start + len(key)]
        if self.coder is not None:
            coder, size = self.coder.on(key.device), max(1, AT_ONCE // self.chunk)
            parts = zip(key.split(size), value.split(size), strict=True)
            self._copy(room, torch.cat([coder.encode_items(*part) for part in parts]))
        elif key.is_cuda:  # halves would pass through other memory
            self._copy(room, torch.stack([key, value], dim=1))
        else:
            room[:, 0], room[:, 1] = key, value

    def _copy(self, room: Tensor, data: Tensor) -> None:
        """One transfer, without waiting for it."""
        room.copy_(data, non_blocking=True)
        if data.is_cuda:
            self.written = mark(data.device)


def _pins(tensor: Tensor) -> bool:
    """Whether copies of it on the host are pinned."""
    return tensor.is_cuda


def _with_room(items: int) -> int:
    """For so many items, and more to come."""
    return items + int(GROWTH * items)


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, pinned: bool, purpose: str, advice: str
) -> Tensor:
    """Host memory. Raises CompressionError, naming purpose and size, when it cannot be had."""
    try:
        if pinned:
            return SLABS.new(shape, dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=False)
    except (RuntimeError, MemoryError) as error:
        size = torch.Size(shape).numel() * dtype.itemsize / 2**20
        raise CompressionError(
            f"host memory for {purpose} ({size:.1f} MiB) cannot be allocated "
            f"({str(error).splitlines()[0]}): free host memory, {advice}"
        ) from error


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    advice = (
        "lower the batch or the prompt, use host_dtype='int8', or a profile with static heads only"
    )
    return allocate(shape, dtype, pinned, "a dynamic head", advice)


@dataclass
class DynamicHead:
    """One (batch row, KV head): host items, device index, and which item every hot slot holds.

    Its storage segment is laid out [sinks | recent | hot slots | tokens since], or without hot
    slots, where these are in fewer `bits` (interface.QuantisedRows). Its index names `rerank` items
    beside the hot ones for exact scores. `hot_score` exists with smoothing only. In a step at most
    `fresh` items become hot.
    """

    layout: DynamicLayout
    host: HostChunks
    index: KeyIndex
    rerank: int
    slots: Int[Tensor, " hot"]
    hot_score: Float[Tensor, " hot"] | None = None
    bits: int = EXACT_BITS
    fresh: int = ANY

    def clone(self) -> DynamicHead:
        """A copy for another beam: shares what does not change with a step."""
        self.host.shared = True
        score = None if self.hot_score is None else self.hot_score.clone()
        return replace(self, slots=self.slots.clone(), hot_score=score)

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicHead:
        """For a copy of the cache: as for another beam."""
        return self.clone()

    @property
    def hot_start(self) -> int:
        """First row of the hot slots within the segment."""
        return self.layout.sinks + self.layout.recent

    @property
    def hot_end(self) -> int:
        """First row of the tokens since within the segment."""
        hot = self.layout.hot * self.layout.chunk
        return self.hot_start + (hot if self.bits == EXACT_BITS else 0)

    def described(self, segment: int, start: int, held: Residents | None = None) -> DynamicSegment:
        """For the kernels: its storage segment has this number and begins at row `start`; `held`
        are its hot slots in fewer bits."""
        return DynamicSegment(
            segment=segment,
            index=self.index,
            slots=self.slots,
            hot_score=self.hot_score,
            host=self.host.data,
            coder=self.host.coder,
            held=held,
            hot_start=start + self.hot_start,
            chunk=self.layout.chunk,
            items=self.layout.items,
            rerank=self.rerank,
            fresh=self.fresh,
        )

    @property
    def rerank_bytes(self) -> int:
        """Bytes of the exact keys that reranking reads from the host at every selection."""
        return candidates(self.rerank, self.layout) * self.host.item_bytes // 2

    @property
    def all_bytes(self) -> int:
        """Bytes of all items, which a pass of several tokens reads."""
        return self.layout.items * self.host.item_bytes

    @property
    def most_read_bytes(self) -> int:
        """Bytes that a decoding step reads from the host at most."""
        half = self.host.item_bytes // (2 * self.layout.chunk)
        return int(read_bytes(self.rerank, self.layout, half, half, self.fresh))

    @property
    def index_bytes(self) -> int:
        """Device bytes of the index."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.index.tensors())

    @property
    def slot_bytes(self) -> int:
        """Device bytes of the slot map, and of smoothed scores."""
        score = 0 if self.hot_score is None else self.hot_score.untyped_storage().nbytes()
        return self.slots.untyped_storage().nbytes() + score

    def all_tokens(
        self, key: Float[Tensor, "stored dim"], value: Float[Tensor, "stored dim"]
    ) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
        """The segment's tokens without the hot copies, and every host item."""
        begin, end = self.hot_start, self.hot_end
        items = self.host.everything(key.device)
        return (
            torch.cat([key[:begin], items[:, 0].flatten(0, 1), key[end:]]),
            torch.cat([value[:begin], items[:, 1].flatten(0, 1), value[end:]]),
        )
