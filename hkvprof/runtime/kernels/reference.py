"""The decode kernels in plain torch, on any device: the definition, and the fallback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.runtime.kernels.interface import DynamicSegment, Extents, QuantisedRows
from hkvprof.runtime.kernels.loading import require
from hkvprof.selection.quantiser import encode

HIDDEN = -2.0
"""The score of items that a mask hides: below that of every other, NaN (-1) included."""


class TorchKernels:
    """See interface.Kernels."""

    name = "torch"

    def attend(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        extents: Extents,
        query: Float[Tensor, "segments group dim"],
        scaling: float,
        quantised: QuantisedRows | None = None,
    ) -> Float[Tensor, "segments group dim"]:
        """Products in the tensors' dtype, softmax in float32.

        Segments of one length at even distances are one batch; others go one by one.
        """
        offsets, lengths = extents.starts, extents.lengths
        if quantised is not None:
            return _attend_all(key, value, extents, query, scaling, quantised)
        views = _batch(key, offsets, lengths), _batch(value, offsets, lengths)
        if views[0] is not None and views[1] is not None:
            return _attend(query, views[0], views[1], scaling)
        out = torch.zeros_like(query)
        for segment, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
            if length:
                own = slice(start, start + length)
                out[segment] = _attend(query[segment], key[own], value[own], scaling)
        return out

    def append(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        ends: Int[Tensor, " segments"],
        new_key: Float[Tensor, "segments tokens dim"],
        new_value: Float[Tensor, "segments tokens dim"],
    ) -> None:
        """Where segments end is not asked."""
        count = new_key.shape[1]
        where = (ends[:, None] + torch.arange(count, device=ends.device)).reshape(-1)
        key.index_copy_(0, where, new_key.reshape(-1, new_key.shape[-1]))
        value.index_copy_(0, where, new_value.reshape(-1, new_value.shape[-1]))
        ends += count

    def bind(
        self,
        storage_key: Float[Tensor, "capacity dim"],
        storage_value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float = 0.0,
        counted: Sequence[Int[Tensor, " heads"]] = (),
    ) -> TorchRetrieval:
        """Prepare the retrieval of a layer's dynamic heads."""
        return TorchRetrieval(storage_key, storage_value, heads, scaling, smoothing, counted)

    def encode(
        self,
        projected: Float[Tensor, "tokens channels"],
        codebook: Float[Tensor, "256 channels"],
        subspaces: Sequence[tuple[int, int]],
    ) -> Int[Tensor, "tokens codes"]:
        """As calibration does it; the caller bounds how many tokens come at once."""
        return encode(projected.float(), codebook, tuple(subspaces))


def _attend_all(
    key: Float[Tensor, "capacity dim"],
    value: Float[Tensor, "capacity dim"],
    extents: Extents,
    query: Float[Tensor, "segments group dim"],
    scaling: float,
    quantised: QuantisedRows,
) -> Float[Tensor, "segments group dim"]:
    """One by one, tokens in fewer bits first."""
    out = torch.zeros_like(query)
    for segment, (start, length) in enumerate(zip(extents.starts, extents.lengths, strict=True)):
        keys, values = key[start : start + length], value[start : start + length]
        held = quantised.of_segment(segment)
        if held is not None:
            more = held.decode()
            keys, values = torch.cat([more[0], keys]), torch.cat([more[1], values])
        if len(keys):
            out[segment] = _attend(query[segment], keys, values, scaling)
    return out


def _attend(
    query: Float[Tensor, "*segments group dim"],
    key: Float[Tensor, "*segments tokens dim"],
    value: Float[Tensor, "*segments tokens dim"],
    scaling: float,
) -> Float[Tensor, "*segments group dim"]:
    logits = query @ key.transpose(-1, -2)
    return torch.softmax(logits.float().mul_(scaling), dim=-1).to(value.dtype) @ value


def _batch(
    flat: Float[Tensor, "capacity dim"], offsets: Sequence[int], lengths: Sequence[int]
) -> Float[Tensor, "segments tokens dim"] | None:
    """A view of segments of one length at even distances; None for any other."""
    distances = {after - before for before, after in pairwise(offsets)}
    if len(set(lengths)) != 1 or len(distances) > 1 or not lengths[0]:
        return None
    rows, width = flat.stride()
    distance = distances.pop() if distances else 0
    shape = (len(lengths), lengths[0], flat.shape[1])
    start = flat.storage_offset() + offsets[0] * rows
    return flat.as_strided(shape, (distance * rows, rows, width), start)


def counters(
    given: Sequence[Int[Tensor, " heads"]], heads: Sequence[DynamicSegment], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What `Retrieval.fetched`, `reads` and `most` count with: the given, or new ones at 0."""
    if not given:
        made = torch.zeros(3, len(heads), dtype=torch.int64, device=device)
        return made[0], made[1], made[2]
    fetched, reads, most = given
    for one in given:
        require((one.dtype, one.device) == (torch.int64, device), "counters of int64")
        require(one.shape == (len(heads),) and one.is_contiguous(), "a counter per dynamic head")
    return fetched, reads, most


class TorchRetrieval:
    """See interface.Retrieval."""

    def __init__(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float,
        counted: Sequence[Int[Tensor, " heads"]] = (),
    ) -> None:
        self.fetched, self.reads, self.most = counters(counted, heads, key.device)
        self.key, self.value, self.heads = key, value, tuple(heads)
        self.scaling, self.smoothing = scaling, smoothing
        self.tensors: Sequence[Tensor] = ()

    def score(self, query: Float[Tensor, "segments group dim"]) -> list[Float[Tensor, " items"]]:
        """Expected attention of every item, per dynamic head."""
        return [self._score(n, query[head.segment]) for n, head in enumerate(self.heads)]

    def step_seeing(
        self,
        query: Float[Tensor, "segments group dim"],
        hidden: Sequence[Bool[Tensor, " items"]],
    ) -> None:
        """`step` as if items that are `hidden`, one mask per head, were not there.

        They are wanted by no query: hot ones make room first.
        """
        self._count(
            self._load(head, self._score(number, query[head.segment], mask), mask)
            for number, (head, mask) in enumerate(zip(self.heads, hidden, strict=True))
        )

    def _score(
        self,
        number: int,
        query: Float[Tensor, "group dim"],
        hidden: Bool[Tensor, " items"] | None = None,
    ) -> Tensor:
        head = self.heads[number]
        if hidden is None:
            score = head.index.score(query, self.scaling)
        else:
            logits = head.index.logits(query.float()) * self.scaling
            score = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).mean(dim=-2)
        if not head.picked:
            return score
        score = torch.where(score.isnan(), -1.0, score.float())
        if hidden is not None:
            score = score.masked_fill(hidden, -1.0)
        score[head.slots.long()] = torch.inf
        best = score.topk(head.picked).indices
        keys = self._keys(number, best).float()
        logits = query.float() @ keys.T * self.scaling
        logits.masked_fill_(~logits.isfinite(), -torch.inf)
        if hidden is not None:
            logits.masked_fill_(hidden[best], -torch.inf)
        exact = logits.softmax(dim=-1).mean(dim=0)
        return torch.full_like(score, -1.0).index_copy_(0, best, exact)

    def step(self, query: Float[Tensor, "segments group dim"]) -> None:
        """Score all items, then load the best."""
        self.load(self.score(query))

    def step_some(
        self, query: Float[Tensor, "segments group dim"], chosen: Bool[Tensor, " heads"]
    ) -> None:
        """Score, then load, of some heads."""
        self._count(
            self._load(head, self._score(number, query[head.segment])) if mine else 0
            for number, (head, mine) in enumerate(zip(self.heads, chosen.tolist(), strict=True))
        )

    def load(self, scores: Sequence[Float[Tensor, " items"]]) -> None:
        """Select and fetch, head by head."""
        self._count(self._load(head, score) for head, score in zip(self.heads, scores, strict=True))

    def _count(self, items: Iterable[int]) -> None:
        """What every head fetched in a step."""
        fetched = self.fetched.new_tensor(list(items))
        self.fetched += fetched
        torch.maximum(self.most, fetched, out=self.most)

    def _load(
        self,
        head: DynamicSegment,
        score: Float[Tensor, " items"],
        hidden: Bool[Tensor, " items"] | None = None,
    ) -> int:
        held = head.slots.long()
        due = torch.where(score.isnan(), -1.0, score.float())
        if self.smoothing > 0:
            assert head.hot_score is not None, "smoothing needs hot_score"
            due = due.clone()
            due[held] = torch.maximum(due[held], self.smoothing * head.hot_score)
        if hidden is not None:
            due = due.masked_fill(hidden, HIDDEN)
        fetched = 0
        if head.hot < head.items:
            wanted = choose(due, held)
            free = (~wanted[held]).nonzero()[:, 0]
            wanted[held] = False
            missing = wanted.nonzero()[:, 0]
            if len(missing) > head.fresh:
                missing = missing[_least(-due[missing], missing, head.fresh)]
                free = free[_least(due[held[free]], -held[free], head.fresh)]
            fetched = len(missing)
            if fetched:
                self._fetch(head, missing, free)
                head.slots[free] = missing.to(head.slots.dtype)
        if self.smoothing > 0:
            assert head.hot_score is not None
            head.hot_score.copy_(due[head.slots.long()])
        return fetched

    def _keys(self, number: int, items: Int[Tensor, " some"]) -> Float[Tensor, "some dim"]:
        """Of items of one token: those of slots where they are hot, others from the host."""
        head = self.heads[number]
        slot = torch.full((head.items,), -1, device=items.device)
        slot[head.slots.long()] = torch.arange(head.hot, device=items.device)
        place = slot[items]
        hot, cold = (place >= 0).nonzero()[:, 0], (place < 0).nonzero()[:, 0]
        keys = self.key.new_empty(len(items), self.key.shape[1])
        keys[hot] = self._hot_keys(head, place[hot])
        keys[cold] = self._items(head, items[cold])[:, 0, 0]
        self.reads[number] += len(cold)
        return keys

    def _hot_keys(self, head: DynamicSegment, slots: Tensor) -> Float[Tensor, "slots dim"]:
        if head.held is None:
            return self.key[head.hot_start + slots]
        return head.held.take(slots).decode()[0]

    def _stored(self, head: DynamicSegment, items: Tensor) -> Tensor:
        """Host items on the device as they are."""
        return head.host[items.to(head.host.device)].to(self.key.device)

    def _items(self, head: DynamicSegment, items: Tensor) -> Float[Tensor, "items 2 chunk dim"]:
        """Host items on the device, in the storage's dtype."""
        data = self._stored(head, items)
        return data if head.coder is None else head.coder.decode_items(data)

    def _fetch(self, head: DynamicSegment, items: Tensor, slots: Tensor) -> None:
        """Copy host items into hot slots; those in fewer bits as rows."""
        if head.held is not None:
            rows = head.held.rows.view(head.hot, head.chunk, -1)
            if head.coder is not None:
                rows[slots] = self._stored(head, items)
            else:
                rows[slots] = head.held.encode_items(*self._items(head, items).unbind(dim=1))
            return
        data = self._items(head, items)
        end = head.hot_start + head.hot * head.chunk
        for part, storage in enumerate((self.key, self.value)):
            hot = storage[head.hot_start : end].view(head.hot, head.chunk, -1)
            hot[slots] = data[:, part]


def _least(key: Tensor, number: Tensor, count: int) -> Tensor:
    """Which `count` entries have the least keys, of equals the lower numbers; in order."""
    order = number.argsort()
    order = order[key[order].argsort(stable=True)]
    return order[:count].sort().values


def choose(due: Float[Tensor, " items"], held: Int[Tensor, " hot"]) -> Tensor:
    """Mark the len(held) items with the largest `due`; of equals, held ones, then lower numbers."""
    count = len(held)
    last = due.topk(count).values[-1]
    wanted = due > last
    room = count - wanted.sum()
    equal = due == last
    is_held = torch.zeros_like(equal)
    is_held[held] = True
    rank = torch.where(
        is_held,
        (equal & is_held).cumsum(0),
        (equal & is_held).sum() + (equal & ~is_held).cumsum(0),
    )
    return wanted | (equal & (rank <= room))
