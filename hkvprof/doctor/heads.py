"""Head by head: do its resident tokens follow from the profile, the queries and the dense keys?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from hkvprof.doctor import residents
from hkvprof.doctor.conversations import Patient
from hkvprof.doctor.recording import RecordedCall, Recording, Seen, Segment
from hkvprof.doctor.records import FaultError
from hkvprof.heads import CALIBRATED, Strategy

Places = list[list[list[int]]]
"""[row][head]: positions of the resident tokens, in the order in which they lie."""


@dataclass(frozen=True)
class _Head:
    """One (row, KV head) at one pass: dense `key` of its row from position `start` on, `window`
    [group, rows, dim] of queries that its last compression looked at; its layer's number among the
    covered ones, and its query heads."""

    segment: Segment
    key: Tensor
    window: Tensor
    scaling: float
    strategy: Strategy
    ratio: float
    layer: int
    heads: slice


@dataclass(frozen=True)
class _Before:
    """What a head held before a pass of `new` tokens, and at which positions."""

    segment: Segment
    places: list[int]
    new: int


class HeadJudge:
    """Follows a recorded run through the reference's passes; sees every pass of every layer."""

    def __init__(self, patient: Patient, recording: Recording) -> None:
        self._recording = recording
        self._keep = recording.profile.keep
        self._ranks = {number: i for i, number in enumerate(sorted(recording.calls))}
        script, size = recording.script, patient.model.dtype.itemsize
        self._plans = [
            recording.profile.allocation(recording.budget, script.tokens - start, size)
            for start in script.starts
        ]
        """One per row, by its own length."""
        self._queries: dict[int, list[Tensor]] = defaultdict(list)
        self._compressed_at: dict[int, int] = {}
        self._places: dict[int, Places] = {}
        self._held: dict[int, list[list[Segment]]] = {}

    def remember(self, seen: Seen) -> None:
        """Note the last queries of a pass that has attended: later compressions look at them."""
        self._queries[seen.number].append(seen.query[:, :, -self._keep.window :])

    def after_prompt(self, seen: Seen, call: RecordedCall) -> None:
        """The layer was just compressed. Raises FaultError."""
        self._compressed_at[seen.number] = seen.key.shape[2]
        self._judge(seen, call, self._window(seen.number), first=True)

    def at_step(self, seen: Seen, call: RecordedCall) -> Places:
        """The layer attended compressed: what to. Raises FaultError."""
        before = seen.key.shape[2] - seen.query.shape[2]
        every = self._recording.options.get("compress_every", 0)
        due = every and before - self._compressed_at[seen.number] >= every
        window = None
        if due:
            self._compressed_at[seen.number] = before
            window = self._window(seen.number)
        return self._judge(seen, call, window, first=False)

    def _window(self, number: int) -> Tensor:
        """The last queries [rows, query_heads, window, dim]."""
        last = torch.cat(self._queries[number], dim=2)[:, :, -self._keep.window :]
        self._queries[number] = [last]
        return last

    def _judge(self, seen: Seen, call: RecordedCall, window: Tensor | None, first: bool) -> Places:
        assert call.segments is not None
        starts, heads = self._recording.script.starts, range(seen.key.shape[1])
        held: Places = []
        for row, start in enumerate(starts):
            held.append([])
            for head in heads:
                segment = call.segments[row][head]
                try:
                    places = self._located(seen, segment, row, head, start)
                    if window is not None:
                        rows = window[row, _group(seen, head)]
                        it = self._head(seen, segment, row, head, start, rows)
                        numbers = {place - start for place in places}
                        if first:
                            self._after_prompt(it, numbers)
                        else:
                            self._again(it, numbers, self._before(seen, row, head), start)
                    self._hot(seen, segment, row, head, start)
                except FaultError as fault:
                    what = f"row {row}, KV head {head}: {fault.what}"
                    raise FaultError(what, fault.cause) from None
                held[row].append(places)
        self._places[seen.number] = held
        self._held[seen.number] = call.segments
        return held

    def _before(self, seen: Seen, row: int, head: int) -> _Before:
        places = self._places[seen.number][row][head]
        return _Before(self._held[seen.number][row][head], places, seen.query.shape[2])

    def _located(self, seen: Seen, segment: Segment, row: int, head: int, start: int) -> list[int]:
        key, value = seen.key[row, head], seen.value[row, head]
        prompt = self._recording.script.tokens
        places = residents.positions(segment, key, value, start, prompt)
        residents.check_structure(segment, places, start, len(key), self._keep)
        return places

    def _head(
        self, seen: Seen, segment: Segment, row: int, head: int, start: int, window: Tensor
    ) -> _Head:
        rank = self._ranks[seen.number]
        plan = self._plans[row]
        strategy = self._recording.profile.strategies[plan.strategy[rank, head]]
        ratio = float(plan.ratio[rank, head])
        return _Head(segment, seen.key[row, head, start:], window, seen.scaling, strategy, ratio,
                     rank, _group(seen, head))  # fmt: skip

    def _after_prompt(self, head: _Head, kept: set[int]) -> None:
        """Raise FaultError unless the head kept as many tokens as planned, and the best ones."""
        smooth = self._recording.options.get("smoothing", 1.0) > 0
        tokens = len(head.key)
        residents.check_count(head.segment, head.strategy, head.ratio, tokens, self._keep, smooth)
        if head.segment.layout is None:
            self._best(head, kept, head.key, tokens)
        elif self._mean_digests:
            residents.check_hot(head.segment, head.window[:, -1], head.key, head.scaling)

    def _again(self, head: _Head, kept: set[int], before: _Before, start: int) -> None:
        """A static head that was pruned again: the best of what it had, as it had it."""
        places = [place - start for place in before.places]
        had = torch.tensor(sorted(places))
        tokens = len(head.key) - before.new
        old = {number for number in kept if number < tokens}
        if head.segment.layout is not None or len(old) == len(had):
            return
        wanted = residents.static_count(head.strategy, head.ratio, tokens, self._keep, head.key)
        if len(old) != wanted:
            raise FaultError(
                f"{len(old)} tokens were kept when new ones joined the budget, where the plan says "
                f"{wanted} of {tokens}",
                residents.PLAN,
            )
        numbers = {i for i, number in enumerate(had.tolist()) if number in old}
        key, _ = residents.given_back(before.segment, places, head.key, head.key)
        self._best(head, numbers, key[had.to(head.key.device)], tokens)

    def _best(self, head: _Head, kept: set[int], key: Tensor, position: int) -> None:
        """Raise FaultError unless the `kept` of these keys score best; `position` is the next."""
        strategy = head.strategy
        if strategy.text_prior or len(kept) == len(key):
            return
        pool = 1 if strategy.index else strategy.pool  # a dynamic head too short for its index
        if strategy.score == CALIBRATED:
            queries = self._recording.profile.queries
            assert queries is not None
            asked = residents.Asked.of(queries, head.layer, head.heads, position)
            residents.check_calibrated(kept, asked, key, head.scaling, pool, self._keep)
            return
        window = head.window[:, -min(head.window.shape[1], len(key)) :]
        try:
            residents.check_static(kept, window, key, head.scaling, pool, self._keep)
        except FaultError as fault:
            for scaling in residents.other_scalings(head.scaling, key.shape[-1]):
                given = (kept, window, key, scaling, pool, self._keep)
                if residents.passes(residents.check_static, *given):
                    raise FaultError(fault.what, residents.SCALING) from None
            raise

    def _hot(self, seen: Seen, segment: Segment, row: int, head: int, start: int) -> None:
        """Raise FaultError unless the best items by a step's own query are hot.

        Not judged where scores are smoothed over steps.
        """
        alone = self._recording.options.get("smoothing") == 0 and self._mean_digests
        if segment.layout is None or seen.query.shape[2] != 1 or not alone:
            return
        key, queries = seen.key[row, head, start:], seen.query[row, :, -1]
        try:
            residents.check_hot(segment, queries[_group(seen, head)], key, seen.scaling)
        except FaultError as fault:
            heads = seen.key.shape[1]
            others = [queries[_group(seen, other)] for other in range(heads) if other != head]
            for query in (*others, queries[head::heads]):
                if residents.passes(residents.check_hot, segment, query, key, seen.scaling):
                    raise FaultError(fault.what, residents.GROUPING) from None
            raise

    @property
    def _mean_digests(self) -> bool:
        return all(s.index in ("", "mean") for s in self._recording.profile.strategies)


def _group(seen: Seen, head: int) -> slice:
    group = seen.query.shape[1] // seen.key.shape[1]
    return slice(head * group, (head + 1) * group)
