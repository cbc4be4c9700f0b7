"""One layer's compressed keys and values: what is resident, what is on the host, how it grows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.models.attention import AttentionCall
from hkvprof.profile.costs import QUIET
from hkvprof.runtime.accounts import (
    POSITIONS,
    LayerAccount,
    LayerState,
    measure,
    open_heads,
    take_heads,
)
from hkvprof.runtime.attention import (
    Places,
    attend,
    attend_seeing,
    own_block,
    segment_positions,
    span,
)
from hkvprof.runtime.copies import LiveState, deep_copy
from hkvprof.runtime.kernels import Kernels, QuantisedRows, for_device
from hkvprof.runtime.packing import (
    Attention,
    Packed,
    Rule,
    in_order,
    pack,
    repack_dynamic,
    repack_static,
    whole,
)
from hkvprof.runtime.plan import BatchRow, HeadPlan, RowPlan, first_rows, reasons
from hkvprof.runtime.prompt import Conversation
from hkvprof.runtime.retrieval import Retriever
from hkvprof.runtime.storage import DynamicHead, RaggedStorage
from hkvprof.selection.static import window_attention

KEPT_WHOLE = "generated tokens are kept whole (compress_every=0)"
TOO_MUCH = "indexes, recent tokens and the floor of a row need more than its budget at this length"
LONG_PASS = (
    "a pass was longer than the room left: its tokens join the budget at the start of the next one"
)


class RaggedLayer(LiveState):
    """A compressed layer (the last of layer_states): segments (row * kv_heads + head), each static,
    dynamic or whole.

    `seen` is the logical length. What came since a row last joined the budget is its tail, which
    its segments hold whole at their ends. A segment's tokens are told in this order: those in fewer
    bits (`quantised`), then those in `storage`.
    """

    shared_attributes = ("_shared", "account", "retriever", "_places")
    absent = "is compressed: every head keeps tokens of its own"
    """Why there are no dense keys and values."""

    def __init__(
        self,
        shared: Conversation,
        number: int,
        account: LayerAccount,
        rows: Sequence[BatchRow],
        scaling: float,
        seen: int,
    ) -> None:
        self.account = account
        self.rows = list(rows)
        self.seen = seen
        self.kv_heads = shared.grid.kv_heads
        self.dynamic: dict[int, DynamicHead] = {}
        self._shared = shared
        self._number = number
        self.scaling = scaling
        self._places: list[Places | None] = []
        self._known = seen
        """Logical length up to which `_places` go."""
        self.storage: RaggedStorage
        self.quantised: QuantisedRows | None = None
        self.retriever = self._new_retriever()

    @classmethod
    def compress(
        cls,
        shared: Conversation,
        number: int,
        account: LayerAccount,
        plans: Sequence[RowPlan],
        query: Float[Tensor, "rows query_heads window dim"],
        key: Float[Tensor, "rows kv_heads tokens dim"],
        value: Float[Tensor, "rows kv_heads tokens dim"],
        tokens: int,
        scaling: float,
        given: Mapping[int, Packed] | None = None,
    ) -> RaggedLayer:
        """Compress the first `tokens` dense positions; later ones become the tail.

        One plan per row. `query` holds the last rows up to position `tokens`. Heads in `given` hold
        what they are given there (batches of one).
        """
        if key.dtype != value.dtype:
            raise CompressionError(
                f"keys are {key.dtype} and values {value.dtype} (torch.autocast does so): expected "
                "one dtype; load the model in the dtype that it is to compute in, without autocast"
            )
        began, held = time.perf_counter(), account.resident_bytes
        rows = first_rows(shared.planner, plans, shared.lengths(tokens), key.element_size(), tokens)
        layer = cls(shared, number, account, rows, scaling, tokens)
        text = shared.text(tokens)
        packed = []
        for row, start in enumerate(shared.starts):
            flags = None if text is None else text[row, start:].to(key.device)
            own_key, own_value = key[row, :, start:tokens], value[row, :, start:tokens]
            shown = shared.shown(row, slice(start, tokens))
            seen = layer._lazy_attention(query[row], own_key, shown)  # once for all heads
            for head in range(layer.kv_heads):
                if given and head in given:
                    packed.append(given[head])
                    continue
                last = query[row, layer._group(head), -1]
                expected = layer._expected(row, head, own_key[head : head + 1], shown)
                attention = expected or partial(_of_head, seen, head)
                one = (own_key[head], own_value[head])
                packed.append(layer._pack(row, head, last, attention, *one, flags))
        starts = [start for start in shared.starts for _ in range(layer.kv_heads)]
        layer._install(packed, [span(start, tokens) for start in starts])
        if key.shape[2] > tokens:
            layer.append(key[:, :, tokens:], value[:, :, tokens:])
        account.state = LayerState.COMPRESSED
        layer._finish(began, held)
        return layer

    @property
    def tail(self) -> int:
        """Tokens that can still be taken back: those since a row last joined the budget."""
        return self.seen - max(row.base for row in self.rows)

    @property
    def has_few_bits(self) -> bool:
        """Whether a segment holds tokens in fewer bits, on the device or the host."""
        loses = any(head.host.loses for head in self.dynamic.values())
        return loses or self.quantised is not None

    @property
    def until(self) -> int:
        """Logical length up to which tokens may come before a row must join the budget."""
        return min(row.until for row in self.rows)

    @property
    def whole_until(self) -> int:
        """The same, of rows that are still dense beside compressed ones."""
        return min((row.until for row in self.rows if row.is_whole), default=QUIET)

    def is_due(self, new: int) -> bool:
        """Whether a row must join the budget before `new` tokens come."""
        return any(row.is_due(self.seen, new) for row in self.rows)

    @property
    def spare(self) -> int:
        """Tokens for which the storage may have room now."""
        return min(row.schedule.spare(self.seen - row.base) for row in self.rows)

    def compress_tail(
        self, query: Float[Tensor, "rows query_heads window dim"], new: int = 1
    ) -> None:
        """Let the tails of rows for which it is time join the budget, before `new` tokens come:
        prune static segments, move full chunks to the host."""
        began, held = time.perf_counter(), self.account.resident_bytes
        self.retriever.join()
        text = self._shared.text(self.seen)
        lengths, size = self._shared.lengths(self.seen), self.storage.key.element_size()
        due = [row.is_due(self.seen, new) for row in self.rows]
        self.rows = [
            row.again(self._shared.planner, number, lengths, size, self.seen)
            if due[number]
            else row
            for number, row in enumerate(self.rows)
        ]
        packed, known = [], []
        for segment in range(self.storage.segments):
            row, head = divmod(segment, self.kv_heads)
            if not due[row]:
                dynamic = segment in self.dynamic
                known.append(None if dynamic else self.known_positions(segment))
                packed.append(self._as_it_is(segment))
                continue
            rows = query[row, self._group(head)]
            if segment in self.dynamic:
                known.append(None)
                packed.append(self._join_dynamic(segment, rows, lengths[row]))
                continue
            order = self._order(segment)
            known.append(self.known_positions(segment)[order.numpy()])
            flags = None if text is None else text[row, known[-1]]
            packed.append(self._join(segment, rows, lengths[row], order, flags))
        self._install(packed, known)
        self._finish(began, held)

    def _join_dynamic(self, segment: int, query: Tensor, tokens: int) -> Packed:
        """A dynamic segment whose tail joins; its row is `tokens` tokens long."""
        rule = self._rule(*divmod(segment, self.kv_heads), self.storage.key.device)
        given, head = (self.storage.keys(segment), self.storage.values(segment)), self.dynamic
        held = None if self.quantised is None else self.quantised.of_segment(segment)
        return repack_dynamic(rule, query[:, -1], *given, tokens, head[segment], held)

    def _join(
        self, segment: int, query: Tensor, tokens: int, order: Tensor, flags: Tensor | None
    ) -> Packed:
        """The same of any other; `order` is that of its tokens' positions."""
        row, head = divmod(segment, self.kv_heads)
        held = None if self.quantised is None else self.quantised.of_segment(segment)
        key, value = self.resident(segment)
        place = order.to(key.device, non_blocking=True)
        if held is not None:
            key, value = key[place], value[place]
        shown = None
        if self._shared.hidden is not None:
            positions = segment_positions(self, segment, resident=True)
            shown = self._shared.shown(row, positions[place])
        expected = self._expected(row, head, key[None], shown)
        attention = expected or self._lazy_attention(query, key[None], shown)
        if len(key) == tokens and held is None:
            return self._pack(row, head, query[:, -1], attention, key, value, flags)
        rule = self._rule(row, head, key.device)
        return repack_static(rule, attention, key, value, tokens, flags, held)

    def _order(self, segment: int) -> Tensor:
        """Numbers of a static segment's tokens in order of position, on the host."""
        count = 0 if self.quantised is None else self.quantised.count(segment)
        sinks = self._shared.planner.profile.keep.sinks
        return in_order(count, sinks, count + self.storage.lengths[segment])

    def _pack(
        self,
        row: int,
        head: int,
        query: Tensor,
        attention: Attention,
        key: Tensor,
        value: Tensor,
        flags: Tensor | None,
    ) -> Packed:
        """A head whose tokens are all there."""
        if self.rows[row].is_whole:
            return whole(key, value)
        return pack(self._rule(row, head, key.device), query, attention, key, value, flags)

    def _as_it_is(self, segment: int) -> Packed:
        """A segment of a row for which it is not time."""
        key, value = self.storage.keys(segment), self.storage.values(segment)
        state, held = self.dynamic.get(segment), None
        if self.quantised is not None:
            held = self.quantised.of_segment(segment)
        count = len(key) + (0 if held is None else len(held.rows))
        kept = None if state is not None else torch.arange(count)
        return Packed(key, value, self.account.heads[segment].strategy, state, kept, held)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedLayer:
        self.retriever.join()  # nothing is written while it is read
        return deep_copy(self, memo)

    # -- tokens ---------------------------------------------------------------------------------

    def append(
        self,
        key: Float[Tensor, "rows kv_heads tokens dim"],
        value: Float[Tensor, "rows kv_heads tokens dim"],
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens, whole; gives them back."""
        before = self.storage.key
        if key.shape[2] > self.storage.room:
            self.retriever.unbind()  # it is bound to tensors that will be replaced
        self.seen += key.shape[2]
        rows = (key.detach().flatten(0, 1), value.detach().flatten(0, 1))
        self.storage.append(*rows, self.spare, self.kernels)
        self._count(key.shape[2])
        if self.storage.key is not before:
            self.measure()
        return key, value

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens, so that the storage stays where it is meanwhile."""
        if count > self.storage.room:
            self.retriever.unbind()
            self.storage.reserve(count)
            self.measure()

    def advance(self, count: int) -> None:
        """Book decoding steps that the device took by itself (or, below 0, did not take)."""
        self.storage.advance(count)
        self.seen += count
        self._count(count)
        self.account.steps += count
        if self.dynamic:
            self.retriever.advance(count)

    def _count(self, tokens: int) -> None:
        self.account.tail += tokens
        self.account.dense_bytes += self.storage.segments * tokens * self.storage.token_bytes
        self._book_budget()

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens.

        Raises CompressionError when the cut would reach into what is compressed.
        """
        if count > self.tail:
            raise CompressionError(
                f"cannot remove {count} tokens: only the {self.tail} tokens since the last "
                "compression can be cropped; start a new cache, or use compress_every=0"
            )
        self.storage.drop_last(count)
        self.seen -= count
        if self.seen < self._known:
            self._known = self.seen
            self._places = [known and known.before(self.seen) for known in self._places]
        self.measure()

    def take_rows(self, rows: Sequence[int]) -> None:
        """Reorder, drop or repeat batch rows; rows made of one share host items and index."""
        heads = self.kv_heads
        segments = [row * heads + head for row in rows for head in range(heads)]
        self.rows = [self.rows[row] for row in rows]
        self.retriever.join()
        self.storage = self.storage.take(segments)
        self.quantised = self.quantised and self.quantised.take(segments)
        old = self.dynamic
        self.dynamic = {i: old[s].clone() for i, s in enumerate(segments) if s in old}
        self._places = [self._places[s] for s in segments]
        take_heads(self.account, segments, heads)
        self.account.reason = reasons([row.plan for row in self.rows])
        self.retriever = self._new_retriever()
        self.measure()

    # -- attention ------------------------------------------------------------------------------

    def attend(self, call: AttentionCall) -> tuple[Tensor, None]:
        """Attention over what is kept, of what the mask shows; the pass's tokens are appended."""
        rows, new = call.query.shape[0], call.query.shape[2]
        view = self._shared.look(call.mask, new, self.seen, begins=self._number == 0)
        if view is not None:
            return attend_seeing(self, call.query, view), None
        if new == 1:
            return self.attend_one(call.query), None
        own = own_block(call.mask, rows, new, self.seen, call.query.device)
        return self.attend_many(call.query, own), None

    def attend_one(
        self, query: Float[Tensor, "rows query_heads 1 dim"]
    ) -> Float[Tensor, "rows 1 query_heads dim"]:
        """One decoding step: dynamic segments fetch what this query asks for, then all attend."""
        self.account.steps += 1
        attend = partial(self.attend_resident, query)
        if not self.dynamic:
            return attend()
        grouped = query.detach().reshape(self.storage.segments, -1, query.shape[-1])
        place = (self.storage, self.quantised)
        return self.retriever.step(self.kernels, *place, grouped, attend)

    def attend_resident(
        self, query: Float[Tensor, "rows query_heads 1 dim"]
    ) -> Float[Tensor, "rows 1 query_heads dim"]:
        """Attention to what is on the device now; nothing is fetched or booked."""
        rows, query_heads, _, dim = query.shape
        storage = self.storage
        grouped = query.detach().reshape(storage.segments, -1, dim)
        place = (storage.key, storage.value, storage.extents)
        out = self.kernels.attend(*place, grouped, self.scaling, self.quantised)
        return out.view(rows, 1, query_heads, -1)

    def attend_many(
        self,
        query: Float[Tensor, "rows query_heads new dim"],
        visible: Bool[Tensor, "rows new new"],
    ) -> Float[Tensor, "rows new query_heads dim"]:
        """A pass of several tokens sees all tokens of dynamic heads, from the host, exactly.

        `visible` says which of this pass's tokens each of them sees.
        """
        self.retriever.join()
        rows, query_heads, new, dim = query.shape
        grouped = query.reshape(self.storage.segments, -1, new, dim)
        outputs = []
        for segment in range(self.storage.segments):
            key, value = self.attended(segment, new)
            block = visible[segment // self.kv_heads]
            outputs.append(attend(grouped[segment], key, value, self.scaling, block))
        out = torch.stack(outputs).view(rows, query_heads, new, -1)
        return out.transpose(1, 2).contiguous()

    def resident(
        self, segment: int
    ) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
        """A segment's keys and values as they are attended to, in the order in which it tells its
        tokens."""
        key, value = self.storage.keys(segment), self.storage.values(segment)
        held = None if self.quantised is None else self.quantised.of_segment(segment)
        if held is None:
            return key, value
        few = held.decode()
        return torch.cat([few[0], key]), torch.cat([few[1], value])

    def attended(
        self, segment: int, new: int
    ) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
        """What a pass of so many tokens attends to: of a dynamic head all tokens, if several."""
        head = self.dynamic.get(segment)
        if head is None or new == 1:
            return self.resident(segment)
        self.account.heads[segment].pass_bytes += head.all_bytes
        return head.all_tokens(self.storage.keys(segment), self.storage.values(segment))

    @property
    def kernels(self) -> Kernels:
        """What computes this layer's decoding steps."""
        return for_device(self.storage.key.device, self.storage.key.dtype)

    # -- bookkeeping ----------------------------------------------------------------------------

    def _group(self, head: int) -> slice:
        group = self._shared.grid.group
        return slice(head * group, (head + 1) * group)

    def _lazy_attention(
        self,
        query: Float[Tensor, "query_heads window dim"],
        key: Float[Tensor, "kv_heads tokens dim"],
        shown: Bool[Tensor, " tokens"] | None,
    ) -> Attention:
        """Attention of the last rows on these tokens, computed when first asked for; on those that
        are `shown`, where a mask hides some."""
        window = min(query.shape[1], self._shared.planner.profile.keep.window, key.shape[1])
        rows = query[:, query.shape[1] - window :]
        return cache(partial(window_attention, rows, key, self.scaling, shown))

    def _expected(
        self,
        row: int,
        head: int,
        key: Float[Tensor, "1 tokens dim"],
        shown: Bool[Tensor, " tokens"] | None,
    ) -> Attention | None:
        """The same of the queries that the profile expects next, where the head's score asks them;
        else None."""
        if self.rows[row].is_whole:
            return None
        planner, strategy = self._shared.planner, self._plan(row, head).strategy
        centres = planner.centres(self._number, head, strategy, key.device)
        if centres is None:
            return None
        position = self._shared.positions.next_of(row, self.start(row), self.seen)
        return partial(centres.attention, key, position, self.scaling, shown)

    def _plan(self, row: int, head: int) -> HeadPlan:
        return self.rows[row].plan.layers[self._number][head]

    def _rule(self, row: int, head: int, device: torch.device) -> Rule:
        planner, plan = self._shared.planner, self._plan(row, head)
        tables = planner.tables(self._number, head, plan.strategy, device)
        ratio = plan.ratio * self.rows[row].schedule.factor
        keep = planner.profile.keep
        own = (row, self.start(row), self.seen)
        positions = partial(self._shared.positions.of, *own, device=device)
        return Rule(
            plan.strategy, ratio, keep, planner.options, tables, self.scaling, plan.fresh, positions
        )

    def start(self, row: int) -> int:
        """First position of a row, after its padding."""
        return self._shared.starts[row]

    def known_positions(self, segment: int) -> NDArray[np.int32]:
        """Positions of the tokens of a segment that is not dynamic, tail included."""
        known = self._places[segment]
        if known is None:
            raise CompressionError(
                f"layer {self.account.layer} holds tokens whose positions are not known: expected "
                "a prompt that hkvprof compressed; masks and text cannot be told from them"
            )
        return np.concatenate([known.read(), span(self._known, self.seen)])

    def _install(self, packed: list[Packed], positions: Sequence[NDArray[np.int32] | None]) -> None:
        self.storage = RaggedStorage([p.key for p in packed], [p.value for p in packed])
        self.quantised = QuantisedRows.of(
            {i: p.held for i, p in enumerate(packed) if p.held is not None}
        )
        self.dynamic = {i: p.dynamic for i, p in enumerate(packed) if p.dynamic is not None}
        self.retriever = self._new_retriever()
        self._known = self.seen
        self._places = [
            None if one.kept is None or known is None else Places(known, one.kept)
            for one, known in zip(packed, positions, strict=True)
        ]
        open_heads(self.account, [p.name for p in packed], self.kv_heads)
        self.measure()

    def _new_retriever(self) -> Retriever:
        options = self._shared.planner.options
        return Retriever(self.dynamic, self.account, options, self.scaling)

    def _finish(self, began: float, held: int) -> None:
        """Of a compression that began then, of what took `held` bytes."""
        self.account.reason = reasons([row.plan for row in self.rows])
        resident = self.account.resident_bytes
        self._shared.meter.set(self._number, held + resident)
        self._shared.meter.set(self._number, resident)
        if not self.storage.key.is_cuda:
            self.account.compression_seconds += time.perf_counter() - began

    def measure(self) -> None:
        """Account for every head's tokens and bytes."""
        starts, held = self._shared.starts, self.quantised
        measure(self.account, self.storage, self.dynamic, starts, self.seen, held)
        self._shared.meter.set(self._number, self.account.resident_bytes)
        self._shared.meter.set(POSITIONS, self._shared.positions.nbytes)
        self._book_budget()

    def _book_budget(self) -> None:
        """What the budget is worth now, and whether there was no room for what came."""
        options = self._shared.planner.options
        tokens = sum(row.schedule.worth.at(self.seen - row.base) for row in self.rows)
        self.account.budget_bytes = tokens * self.kv_heads * self.storage.token_bytes
        self.account.excess = ""
        if not options.compress_every:
            self.account.excess = KEPT_WHOLE
        elif self.seen > self.until:
            self.account.excess = LONG_PASS
        elif not all(row.schedule.fits for row in self.rows):
            self.account.excess = TOO_MUCH


def _of_head(attention: Attention, head: int) -> Tensor:
    return attention()[head : head + 1]
