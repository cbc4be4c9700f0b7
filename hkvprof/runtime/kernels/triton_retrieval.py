"""Score, select and gather for the dynamic heads of a layer: the order of the launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.profile.costs import scale_group
from hkvprof.runtime.devices import at
from hkvprof.runtime.kernels import triton_compact as compacted
from hkvprof.runtime.kernels import triton_scores as scores_of
from hkvprof.runtime.kernels import triton_select as selection
from hkvprof.runtime.kernels.interface import DynamicSegment, device_integers
from hkvprof.runtime.kernels.loading import check_head, check_storage, require
from hkvprof.runtime.kernels.reference import counters
from hkvprof.runtime.kernels.triton_attend import LOG2_E, TILE_BYTES
from hkvprof.runtime.kernels.triton_common import (
    ACTIVE,
    FIELDS,
    INTERPRETED,
    LEAST_DOT,
    Launch,
    blocks,
    items_of,
    kind_of,
    padded,
    picked_of,
)
from hkvprof.runtime.kernels.triton_items import (
    exact_kernel,
    gather_kernel,
    gather_rows_kernel,
)
from hkvprof.selection.index import ProjectedIndex

CODED_ITEMS = 512
"""Items of a projected index per program."""
SHARE_ITEMS = 256
"""Items per program that turns logits into scores."""
RESET_BLOCKS = 16
"""Blocks of picked items in which a program resets scores."""
SELECT_ITEMS = 4096
"""Items per round of the one program that selects for a head."""
BEST_ITEMS = 2048
"""Items of which a program lists the best."""
MARK_ITEMS = 4096
"""Items that a program marks at a time."""
MOST_CANDIDATES = 16384
"""Of a head; more do not fit into the registers of one program."""
ROW_TOKENS = 16
"""Tokens that a program brings where they are rows of bytes."""
GATHER_ELEMENTS = 2048
"""Numbers that a program copies at a time."""
WORDS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@dataclass(frozen=True)
class Compact:
    """Sizes of a step that selects among candidates alone (triton_compact).

    `blocks` of BEST_ITEMS items, `room` candidates beside the hot ones, `entries` that they are
    chosen from, `candidates`, `parts` of them that have partial sums.
    """

    blocks: int
    room: int
    entries: int
    candidates: int
    parts: int

    @classmethod
    def of(cls, heads: Sequence[DynamicSegment], block: int) -> Compact | None:
        """None where a head decides by its index alone, or has too many candidates."""
        coded = all(isinstance(head.index, ProjectedIndex) for head in heads)
        if not coded or any(not picked_of(head) for head in heads):
            return None
        room = max(picked_of(head) - head.hot for head in heads)
        count = blocks(max(head.items for head in heads), BEST_ITEMS)
        most = max(map(picked_of, heads))
        made = cls(count, room, padded(count * room), padded(most), max(map(_parts(block), heads)))
        return made if max(made.entries, made.candidates) <= MOST_CANDIDATES else None

    @property
    def warps(self) -> int:
        """Of the program that chooses: 16 candidates per thread."""
        return min(32, max(4, self.candidates // 512))


def _parts(block: int) -> Callable[[DynamicSegment], int]:
    """How many partial sums the candidates of a head have, by blocks of so many."""

    def count(head: DynamicSegment) -> int:
        return -(-head.hot // block) + -(-(picked_of(head) - head.hot) // block)

    return count


@dataclass(frozen=True)
class FetchKind:
    """How items come into hot slots: which of the two sides are rows of so many bits (0: none)."""

    chunk: int
    from_rows: bool
    to_rows: bool
    bits: int

    @classmethod
    def of(cls, head: DynamicSegment) -> FetchKind:
        """How the items of this head come in."""
        rows = head.held or head.coder
        sides = head.coder is not None, head.held is not None
        return cls(head.chunk, *sides, 0 if rows is None else rows.format.bits)


def _comes(most: int, tokens: int) -> Callable[[DynamicSegment], int]:
    """How many items of a head come in a step at most, times `tokens`."""
    return lambda head: min(head.hot, head.fresh, most) * tokens


@dataclass(frozen=True)
class Scratch:
    """What the launches of one step hand on, in one piece of device memory."""

    logits: Tensor
    tops: Tensor
    sums: Tensor
    tables: Tensor
    due: Tensor
    best: Tensor
    cold: Tensor
    missing: Tensor
    free: Tensor
    counts: Tensor
    held: Tensor

    @classmethod
    def of(cls, owner: TritonRetrieval, compact: Compact, group: int, tables: int) -> Scratch:
        """Tensors of these sizes, not initialised."""
        items, parts, heads = owner.all_items, owner.all_parts * group, len(owner.heads)
        float32, int32 = torch.float32, torch.int32
        sizes = {
            "logits": (items * group, float32),
            "tops": (parts, float32),
            "sums": (parts, float32),
            "tables": (tables, float32),
            "due": (items, float32),
            "best": (heads * compact.blocks * compact.room, torch.int64),
            "cold": (heads * compact.room, int32),
            "missing": (items, int32),
            "free": (items, int32),
            "counts": (heads, int32),
            "held": (items, torch.int8),
        }
        ends, end = {}, 0
        for name, (count, dtype) in sizes.items():
            begin, end = end, end + -(-count * dtype.itemsize // 16) * 16
            ends[name] = (begin, count * dtype.itemsize, dtype)
        whole = torch.empty(end, dtype=torch.uint8, device=owner.key.device)
        views = {name: whole[b : b + n].view(dtype) for name, (b, n, dtype) in ends.items()}
        return cls(**views)


class TritonRetrieval:
    """See interface.Retrieval."""

    def __init__(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float,
        counted: Sequence[Int[Tensor, " heads"]],
    ) -> None:
        check_storage(key, value)
        self.fetched, self.reads, self.most = counters(counted, heads, key.device)
        self.key, self.value, self.heads = key, value, tuple(heads)
        self._scale, self._smoothing = scaling * LOG2_E, smoothing
        self._dim = key.shape[1]
        few = {one.format.bits for head in heads if (one := head.held or head.coder)}
        self._width = padded(self._dim, 2 * LEAST_DOT if few else LEAST_DOT)
        self._rows = {
            "HAS_8": 8 in few,
            "HAS_4": 4 in few,
            "RUN": scale_group(4, self._dim),
            "FLOAT": tl.float32 if key.dtype == torch.float32 else tl.float16,
            "UPCAST": INTERPRETED,
        }
        self._block = min(128, max(16, TILE_BYTES // (self._width * key.element_size())))
        self._alive: list[Tensor] = []
        self.tensors: Sequence[Tensor] = self._alive
        if not heads:
            return
        self._describe_all()
        everyone = list(range(len(heads)))
        reranked = [n for n in everyone if picked_of(self.heads[n])]
        cold = [picked_of(head) and picked_of(head) - head.hot for head in heads]
        self._cold = device_integers(cold, key.device)
        self._last = max(head.segment for head in self.heads)
        self._compact = Compact.of(self.heads, self._block)
        self._everyone = self._launch(None, everyone)
        self._reranked = self._launch(None, reranked) if reranked else None
        self._indexes = list(self._launches(everyone, lambda head: kind_of(head.index)))
        self._gathers = list(self._launches(everyone, FetchKind.of))

    def score(self, query: Float[Tensor, "segments group dim"]) -> list[Float[Tensor, " items"]]:
        """Expected attention of every item, per dynamic head."""
        if not self.heads:
            return []
        with at(self.key.device):
            return list(self._score(query).split([head.items for head in self.heads]))

    def load(self, scores: Sequence[Float[Tensor, " items"]]) -> None:
        """Select items by these scores and fetch them."""
        sizes = [head.items for head in self.heads]
        require([len(score) for score in scores] == sizes, "a score per item of every head")
        if self.heads:
            with at(self.key.device):
                self._load(torch.cat([score.float() for score in scores]))

    def step(self, query: Float[Tensor, "segments group dim"]) -> None:
        """Score all items, then load the best."""
        if not self.heads:
            return
        with at(self.key.device):
            if self._compact is not None:
                self._step_among(self._compact, query)
            else:
                self._load(self._score(query))

    def step_some(
        self, query: Float[Tensor, "segments group dim"], chosen: Bool[Tensor, " heads"]
    ) -> None:
        """Score and load; programs of other heads end at once."""
        if not self.heads:
            return
        active = self._table[:, ACTIVE.value]
        active.copy_(chosen)
        self.step(query)
        active.fill_(1)

    def _fitting(self, query: Float[Tensor, "segments group dim"]) -> Tensor:
        """Queries as the kernels read them."""
        segments, _, dim = query.shape
        require(dim == self._dim, "queries as wide as keys")
        require(segments > self._last, "a query for every dynamic head's segment")
        return query.to(self.key.dtype).contiguous()

    def _step_among(self, compact: Compact, query: Float[Tensor, "segments group dim"]) -> None:
        """Score all items, compare candidates, fetch: six launches, one allocation."""
        query, group = self._fitting(query), query.shape[1]
        tables = sum(len(one.heads) * one.kind for one in self._indexes) * group * 256
        scratch = Scratch.of(self, compact, group, tables)
        partial = (scratch.logits, scratch.tops, scratch.sums)
        sizes = {"GROUP": padded(group), "DIM": self._dim, "WIDTH": self._width}
        given = scratch.tables
        for launch in self._indexes:
            self._estimate(launch, query, partial, sizes, given, scratch.held)
            given = given[len(launch.heads) * launch.kind * group * 256 :]
        count, chosen = len(self.heads), (scratch.best, scratch.cold)
        compacted.best_kernel[(count, compact.blocks)](
            self._table, *partial, scratch.held, scratch.best, group, compact.blocks,
            BLOCK=BEST_ITEMS, PART_TILE=64, ROOM=compact.room, num_warps=8,
        )  # fmt: skip
        compacted.candidate_kernel[(count, compact.parts)](
            self._table, query, self.key, *chosen, *partial, self._scale, group, compact.blocks,
            **sizes, BLOCK=self._block, ROOM=compact.room, ENTRIES=compact.entries, **self._rows,
        )  # fmt: skip
        smooth = self._smoothing > 0
        compacted.choose_kernel[(count,)](
            self._table, *partial, scratch.cold, scratch.due, scratch.missing, scratch.free,
            scratch.counts, self.fetched, self.reads, self.most, group, float(self._smoothing),
            BLOCK=compact.candidates, PART_TILE=64, EXACT_ITEMS=self._block, ROOM=compact.room,
            SMOOTH=smooth, num_warps=compact.warps,
        )  # fmt: skip
        self._gather(scratch.due, scratch.missing, scratch.free, scratch.counts, compact.room)

    def _score(self, query: Float[Tensor, "segments group dim"]) -> Float[Tensor, " all_items"]:
        """Scores of all items of all heads, one head after the other."""
        query, group = self._fitting(query), query.shape[1]
        scores, logits = self._floats(self.all_items), self._floats(self.all_items * group)
        partial = (
            logits,
            self._floats(self.all_parts * group),
            self._floats(self.all_parts * group),
        )
        sizes = {"GROUP": padded(group), "DIM": self._dim, "WIDTH": self._width}
        for launch in self._indexes:
            codes = launch.kind if isinstance(launch.kind, int) else 0
            tables = self._floats(len(launch.heads) * group * codes * 256)
            self._estimate(launch, query, partial, sizes, tables)
        picked = torch.empty(self.all_items, dtype=torch.int32, device=self.key.device)
        shared = (*partial, picked, scores, group)
        share = {"GROUP": padded(group, 1), "BLOCK": SHARE_ITEMS, "EXACT_ITEMS": self._block}
        everyone = self._everyone
        grid = everyone.grid(items_of, SHARE_ITEMS)
        scores_of.share_kernel[grid](self._table, everyone.which, *shared, EXACT=False, **share)
        if self._reranked is None:
            return scores
        self.reads += self._cold * self._table[:, ACTIVE.value]
        which, count = self._reranked.which, len(self._reranked.heads)
        places = torch.full_like(picked, -1)
        selection.raise_kernel[self._reranked.grid(lambda head: head.hot, 256)](
            self._table, which, scores, places, BLOCK=256
        )
        selection.pick_kernel[(count,)](
            self._table, which, scores, picked, BLOCK=self._round(), num_warps=8
        )
        reset = RESET_BLOCKS * self._block
        picks = self._reranked.grid(picked_of, self._block)
        exact_kernel[max(picks, self._reranked.grid(items_of, reset))](
            self._table, which, query, self.key, picked, places, scores, *partial, self._scale,
            group, **sizes, BLOCK=self._block, RESET=reset, **self._rows,
        )  # fmt: skip
        grid = self._reranked.grid(picked_of, SHARE_ITEMS)
        scores_of.share_kernel[grid](self._table, which, *shared, EXACT=True, **share)
        return scores

    def _estimate(
        self,
        launch: Launch,
        query: Tensor,
        partial: tuple[Tensor, Tensor, Tensor],
        sizes: dict[str, int],
        tables: Tensor,
        held: Tensor | None = None,
    ) -> None:
        """Logits of one kind of index; with `held`, what is hot is marked there."""
        group = query.shape[1]
        if not isinstance(launch.kind, int):
            scores_of.digest_kernel[launch.grid(items_of, self._block)](
                self._table, launch.which, query, *partial, self._scale, group, **sizes,
                BLOCK=self._block, MINMAX=launch.kind == "minmax", UPCAST=INTERPRETED,
            )  # fmt: skip
            return
        codes, count = launch.kind, len(launch.heads)
        mark = 0 if held is None else MARK_ITEMS
        narrow = {**sizes, "GROUP": padded(group, 1)}
        scores_of.table_kernel[(count, codes)](
            self._table, launch.which, query, tables, tables if held is None else held, group,
            **narrow, CODES=codes, MARK=mark,
        )  # fmt: skip
        scores_of.coded_kernel[launch.grid(items_of, CODED_ITEMS)](
            self._table, launch.which, tables, *partial, self._scale, group,
            GROUP=padded(group, 1), CODES=codes, WORD=WORDS[codes], BLOCK=CODED_ITEMS,
        )  # fmt: skip

    def _load(self, scores: Float[Tensor, " all_items"]) -> None:
        """Select by all heads' scores and fetch."""
        device, count = self.key.device, len(self.heads)
        due = self._floats(self.all_items)
        held = torch.empty(self.all_items, dtype=torch.int8, device=device)
        missing, free = torch.empty((2, self.all_items), dtype=torch.int32, device=device)
        counts = torch.empty(count, dtype=torch.int32, device=device)
        smooth = self._smoothing > 0
        everyone = self._everyone
        selection.due_kernel[everyone.grid(items_of, 1024)](
            self._table, scores, due, held, BLOCK=1024
        )
        selection.hold_kernel[everyone.grid(lambda head: head.hot, 256)](
            self._table, due, held, float(self._smoothing), BLOCK=256, SMOOTH=smooth
        )
        selection.select_kernel[(count,)](
            self._table, due, held, missing, free, counts, self.fetched, self.most,
            BLOCK=self._round(), SMOOTH=smooth, num_warps=8,
        )  # fmt: skip
        self._gather(due, missing, free, counts, max(head.hot for head in self.heads))

    def _gather(
        self, due: Tensor, missing: Tensor, free: Tensor, counts: Tensor, most: int
    ) -> None:
        """Fetch what is missing, at most `most` items of a head."""
        smooth = self._smoothing > 0
        for launch in self._gathers:
            fetch, given = launch.kind, (due, missing, free, counts)
            args = (self._table, launch.which, self.key, self.value, *given)
            if fetch.bits:
                gather_rows_kernel[launch.grid(_comes(most, fetch.chunk), ROW_TOKENS)](
                    *args, CHUNK=fetch.chunk, FROM_ROWS=fetch.from_rows, TO_ROWS=fetch.to_rows,
                    BITS=fetch.bits, RUN=self._width if fetch.bits == 8 else self._rows["RUN"],
                    DIM=self._dim, WIDTH=self._width, BLOCK=ROW_TOKENS, SMOOTH=smooth,
                    UPCAST=INTERPRETED,
                )  # fmt: skip
                continue
            block = min(GATHER_ELEMENTS, padded(2 * fetch.chunk * self._dim))
            rows = GATHER_ELEMENTS // block
            gather_kernel[launch.grid(_comes(most, 1), rows)](
                *args, CHUNK=fetch.chunk, DIM=self._dim, ROWS=rows, BLOCK=block, SMOOTH=smooth
            )

    def _floats(self, count: int) -> Float[Tensor, " count"]:
        return torch.empty(count, dtype=torch.float32, device=self.key.device)

    def _round(self) -> int:
        return min(SELECT_ITEMS, padded(max(head.items for head in self.heads), 128))

    # -- what the kernels are told once ------------------------------------------------------

    def _launch(self, kind: Any, numbers: Sequence[int]) -> Launch:
        which = device_integers(list(numbers), self.key.device)
        self._alive.append(which)
        return Launch(kind, tuple(self.heads[n] for n in numbers), which)

    def _launches(
        self, numbers: Sequence[int], kind: Callable[[DynamicSegment], Hashable]
    ) -> Iterator[Launch]:
        """Heads of one kind each."""
        kinds = {n: kind(self.heads[n]) for n in numbers}
        for one in dict.fromkeys(kinds.values()):
            yield self._launch(one, [n for n in numbers if kinds[n] == one])

    def _describe_all(self) -> None:
        """The table of descriptors, and the sizes of scratch."""
        bounds: list[list[int]] = []
        for head in self.heads:
            if isinstance(head.index, ProjectedIndex):
                bounds += [list(pair) for pair in head.index.tables.subspaces]
        where = self._hold(device_integers(bounds, self.key.device)) if bounds else 0
        self.all_items = self.all_parts = 0
        rows = []
        for head in self.heads:
            coded = isinstance(head.index, ProjectedIndex)
            block = CODED_ITEMS if coded else self._block
            rows.append(self._describe(head, block, where))
            self.all_items += head.items
            candidates = _parts(self._block)(head) if picked_of(head) else 1
            self.all_parts += max(blocks(head.items, block), candidates)
            if isinstance(head.index, ProjectedIndex):
                where += 16 * len(head.index.tables.subspaces)
        self._table = device_integers(rows, self.key.device)
        self._alive.append(self._table)

    def _describe(self, head: DynamicSegment, block: int, bounds: int) -> list[int]:
        """A row of the table (triton_common.FIELDS)."""
        check_head(head, self.key, self._smoothing)
        index, rest = head.index, [0, 0, 0, 0, 0]
        if isinstance(index, ProjectedIndex):
            tables = index.tables
            rest = [
                self._hold(index.codes),
                0,
                self._hold(tables.query_projection.float()),
                self._hold(tables.codebook.float()),
                tables.codebook.shape[1],
            ]
        else:
            digests = [self._hold(tensor) for tensor in index.tensors()]
            rest[: len(digests)] = digests
        row = [
            head.segment,
            head.items,
            head.hot,
            head.hot_start,
            picked_of(head),
            self.all_items,
            self.all_parts,
            block,
            *rest,
            self._hold(head.slots),
            self._hold(head.hot_score),
            self._hold(head.host),
            bounds,
            1,
            head.fresh,
            *self._describe_rows(head),
        ]
        assert len(row) == FIELDS.value
        return row

    def _describe_rows(self, head: DynamicSegment) -> list[int]:
        """ROWS, MEAN, HOT_BITS and HOST_BITS; the mean of host items comes to the device."""
        one = head.held or head.coder
        if one is None:
            return [0, 0, 0, 0]
        mean = one.mean
        if mean.device != self.key.device:
            mean = (mean.pin_memory() if self.key.is_cuda else mean).to(
                self.key.device, non_blocking=True
            )
        bits = one.format.bits
        rows = 0 if head.held is None else self._hold(head.held.rows, 4)
        return [rows, self._hold(mean), bits if rows else 0, bits if head.coder else 0]

    def _hold(self, tensor: Tensor | None, unit: int = 16) -> int:
        """Address of a contiguous tensor, which is kept alive."""
        if tensor is None:
            return 0
        self._alive.append(tensor.contiguous())
        place = self._alive[-1].data_ptr()
        require(place % unit == 0, f"tensors at multiples of {unit} bytes, to be read wide")
        return place
