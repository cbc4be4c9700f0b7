"""What a set of decode kernels can do, and what it is told about a dynamic head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.profile.budgets import ANY
from hkvprof.selection.index import KeyIndex
from hkvprof.selection.residents import Residents, RowFormat

MOST_BYTES = 2**31 - 1
"""Of a layer's tokens in fewer bits: where they lie is told to the device as int32."""


def device_integers(
    numbers: Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """On the device; copied from pinned memory, so that the host need not wait."""
    made = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


@dataclass(frozen=True)
class Extents:
    """Where the segments of a layer lie in its flat storage, told to the host and to the device.

    Segment s is rows starts[s] to starts[s] + lengths[s]; `device_starts` and `device_ends` say the
    same as int32 on the storage's device (rows, not bytes). `longest` bounds all lengths and is the
    same at every step until the storage grows.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    longest: int
    device_starts: Int[Tensor, " segments"]
    device_ends: Int[Tensor, " segments"]

    @classmethod
    def of(
        cls, starts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu"
    ) -> Extents:
        """Of numbers on the host."""
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        first, end = device_integers([list(starts), ends], torch.device(device), torch.int32)
        return cls(starts, lengths, max(lengths, default=0), first, end)


@dataclass(frozen=True)
class QuantisedRows:
    """Tokens in fewer bits of a layer's segments, beside those in its flat storage.

    `rows` holds one segment after the other, those in 4 bits first, the tokens of a segment as
    selection.residents lays them out, without padding; `mean` what was taken off keys and values,
    in the storage's dtype. Entry i is about storage segment `segments[i]`: `counts[i]` tokens of
    `bits[i]` bits from byte `starts[i]` on. `places` tells the device segment, start and count.
    """

    rows: UInt8[Tensor, " bytes"]
    mean: Float[Tensor, "quantised 2 dim"]
    segments: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    bits: Sequence[int]
    places: Int[Tensor, "quantised 3"]

    @classmethod
    def of(cls, held: Mapping[int, Residents]) -> QuantisedRows | None:
        """A copy of what segments hold; None where none holds any. Raises CompressionError where it
        is more than the device can be told of."""
        if not held:
            return None
        parts = list(held.values())
        order = sorted(range(len(parts)), key=lambda number: parts[number].format.bits)
        sizes = [parts[number].rows.nbytes for number in order]
        if sum(sizes) > MOST_BYTES:
            raise CompressionError(
                f"a layer's tokens in fewer bits take {sum(sizes) / 2**30:.1f} GiB, expected less "
                "than 2 GiB: lower the batch or the budget"
            )
        begins = dict(zip(order, accumulate(sizes, initial=0), strict=False))
        starts = [begins[number] for number in range(len(parts))]
        counts, bits = [len(part.rows) for part in parts], [part.format.bits for part in parts]
        rows = torch.cat([parts[number].rows.flatten() for number in order])
        told = list(zip(held, starts, counts, strict=True))
        places = device_integers(told, rows.device, torch.int32)
        mean = torch.stack([part.mean for part in parts])
        return cls(rows, mean, list(held), starts, counts, bits, places)

    @cached_property
    def eights(self) -> int:
        """The byte at which the rows in 8 bits begin, behind all others."""
        starts = (s for s, bits in zip(self.starts, self.bits, strict=True) if bits == 8)
        return min(starts, default=len(self.rows))

    @cached_property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Per number of bits: tokens of the segment that has most, and bytes of a token."""
        most: dict[int, tuple[int, int]] = {}
        for bits, count in zip(self.bits, self.counts, strict=True):
            row = RowFormat(bits, self.mean.shape[2]).row_bytes
            most[bits] = max(most.get(bits, (0, row)), (count, row))
        return most

    def at(self, number: int) -> Residents:
        """What entry `number` is about; rows are views."""
        form = RowFormat(self.bits[number], self.mean.shape[2])
        start, count = self.starts[number], self.counts[number]
        rows = self.rows[start : start + count * form.row_bytes].view(count, form.row_bytes)
        return Residents(form, self.mean[number], rows)

    def of_segment(self, segment: int) -> Residents | None:
        """What a storage segment holds; None where that is nothing."""
        return self.at(self.segments.index(segment)) if segment in self.segments else None

    def count(self, segment: int) -> int:
        """Tokens in fewer bits of a storage segment."""
        return self.counts[self.segments.index(segment)] if segment in self.segments else 0

    def take(self, segments: Sequence[int]) -> QuantisedRows | None:
        """A copy for the given storage segments (with repetition), in their new order."""
        found = {new: self.of_segment(old) for new, old in enumerate(segments)}
        return QuantisedRows.of({new: one for new, one in found.items() if one is not None})

    def nbytes(self, segment: int) -> int:
        """Device bytes of a storage segment's entry; 0 where it has none."""
        held = self.of_segment(segment)
        return 0 if held is None else held.nbytes + self.places[0].nbytes


@dataclass(frozen=True)
class DynamicSegment:
    """One dynamic head as the kernels see it; tensors are shared with the layer, never copied.

    Its storage segment is number `segment`; slot j of its hot region holds the `chunk` tokens of
    item `slots[j]` in rows `hot_start + j * chunk` of the flat storage. `host` [items, 2, chunk,
    dim] has K then V of an item, in the storage's dtype. `hot_score` [hot] is needed where
    smoothing is used; `rerank` above 0 needs chunks of one token. At most `fresh` items become hot
    in a step.

    With `held` hot slots are in fewer bits: slot j is its rows from `j * chunk` on, and nothing of
    it in the flat storage. With `coder` the host holds rows, uint8 [items, chunk, row_bytes], by
    its format and mean, which are those of `held` where there is that.
    """

    segment: int
    index: KeyIndex
    slots: Int[Tensor, " hot"]
    host: Tensor
    hot_start: int
    chunk: int
    items: int
    hot_score: Float[Tensor, " hot"] | None = None
    rerank: int = 0
    held: Residents | None = None
    coder: Residents | None = None
    fresh: int = ANY

    @property
    def hot(self) -> int:
        """Number of hot slots."""
        return len(self.slots)

    @property
    def picked(self) -> int:
        """Candidates whose own keys are compared; 0 where the index decides alone."""
        reranks = self.rerank > 0 and self.hot < self.items
        return min(self.hot + self.rerank, self.items) if reranks else 0


class Retrieval(Protocol):
    """One layer's dynamic heads, bound to its tensors; bind again when any of them is replaced.

    On CUDA nothing here makes the host wait for the device, but looking at `fetched`, `reads` and
    `most`.
    """

    fetched: Int[Tensor, " heads"]
    """Items fetched so far per dynamic head, int64 on the storage's device."""

    reads: Int[Tensor, " heads"]
    """Keys read from the host so far to compare candidates, likewise."""

    most: Int[Tensor, " heads"]
    """Most items fetched in one step, likewise."""

    tensors: Sequence[Tensor]
    """Its own on the device, beside those it was given."""

    def score(self, query: Float[Tensor, "segments group dim"]) -> list[Float[Tensor, " items"]]:
        """Per dynamic head, the share of attention expected by every item.

        Softmax per query head over the items, mean over the group. With a head's `rerank` n above
        0, unless all items are hot: of the hot items and of the n others with the highest such
        score (NaN: -1), the same by their own keys (softmax over those items, where a logit that
        is not finite counts as minus infinity; NaN where a query head has no other); -1 for all
        others. Keys of items that are hot are those of their slots, all others are read from the
        host.
        """
        ...

    def load(self, scores: Sequence[Float[Tensor, " items"]]) -> None:
        """Select by `scores`, fetch what is not hot yet and count its items.

        With d = score (NaN: -1), for every hot slot j: d[slots[j]] = max(d[slots[j]], smoothing *
        hot_score[j]). The `hot` items with the largest d are wanted; of equals, first those that
        are hot, then the lower number. Where more than `fresh` of them are not hot yet, only the
        best `fresh` come, in place of as many hot ones, the last in that order. hot_score becomes
        the d of the items that the slots then hold.
        """
        ...

    def step(self, query: Float[Tensor, "segments group dim"]) -> None:
        """`score`, then `load`."""
        ...

    def step_some(
        self, query: Float[Tensor, "segments group dim"], chosen: Bool[Tensor, " heads"]
    ) -> None:
        """`step` of the heads that `chosen` marks, on the device; others stay as they are."""
        ...


class Kernels(Protocol):
    """Functions of the decode step; all tensors on one device and contiguous.

    S segments are batch rows x KV heads in row-major order.
    """

    @property
    def name(self) -> str:
        """`native`, `triton` or `torch`."""
        ...

    def attend(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        extents: Extents,
        query: Float[Tensor, "segments group dim"],
        scaling: float,
        quantised: QuantisedRows | None = None,
    ) -> Float[Tensor, "segments group dim"]:
        """One new token per row attends to its whole segment; an empty segment gives zeros.

        One softmax over the segment's tokens in storage and its `quantised` ones, as
        `Residents.decode` gives them back.
        """
        ...

    def append(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        ends: Int[Tensor, " segments"],
        new_key: Float[Tensor, "segments tokens dim"],
        new_value: Float[Tensor, "segments tokens dim"],
    ) -> None:
        """Write tokens behind the end of every segment and advance `ends`, all on the device."""
        ...

    def bind(
        self,
        storage_key: Float[Tensor, "capacity dim"],
        storage_value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float = 0.0,
        counted: Sequence[Int[Tensor, " heads"]] = (),
    ) -> Retrieval:
        """Prepare the retrieval of a layer's dynamic heads.

        `fetched`, `reads` and `most` are counted on, where `counted` gives them.
        """
        ...

    def encode(
        self,
        projected: Float[Tensor, "tokens channels"],
        codebook: Float[Tensor, "256 channels"],
        subspaces: Sequence[tuple[int, int]],
    ) -> Int[Tensor, "tokens codes"]:
        """Nearest centroid per subspace as uint8, of equals the first; NaN and infinity mean 0."""
        ...
