"""A cache layer that is dense while the prompt comes in and compressed from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hkvprof.errors import CompressionError
from hkvprof.models.attention import AttentionCall, mark
from hkvprof.profile.costs import QUIET
from hkvprof.runtime.attention import attend_seeing
from hkvprof.runtime.copies import LiveState
from hkvprof.runtime.dense_states import DenseStates
from hkvprof.runtime.masks import own_block
from hkvprof.runtime.packing import Packed
from hkvprof.runtime.parked import ParkedPrompt
from hkvprof.runtime.plan import HeadPlan, Row, RowPlan, reasons
from hkvprof.runtime.prompt import Conversation
from hkvprof.runtime.ragged import RaggedLayer
from hkvprof.runtime.receipt import LayerAccount

NEAR = 2
"""Windows of tokens before a compression from which on queries are kept for it: one to fill the
window, one for steps that may be replayed (runtime.graph)."""


class CompressedLayer(LiveState, DenseStates, DynamicLayer):
    """Dense until the prompt is complete, compressed as soon as its attention is done then.

    A layer whose plan says so (budget 1.0, short prompt) stays dense and behaves bit for bit as
    the stock layer. Later compressions (`compress_every`) happen at the start of a pass, when all
    tokens in the cache are final.
    """

    shared_attributes = ("_shared", "account")
    """Not this layer's own memory (see receipt.measure_storage)."""
    query_attributes = ("_window",)
    """Queries for the next compression, which are counted by themselves."""

    def __init__(self, number: int, shared: Conversation) -> None:
        super().__init__()
        self.number = number
        self.account = LayerAccount(shared.layer_ids[number])
        self.ragged: RaggedLayer | None = None
        self.parked: ParkedPrompt | None = None
        self._shared = shared
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = self.ragged = self.parked = None
        self._seen = 0
        self._until = self._shared.planner.options.compress_every
        """Logical length up to which a layer that stays dense need not decide again."""
        self._complete = False
        self._reopened = False
        """Whether the prompt was complete before, and went on while all was dense."""
        self._owed = False
        """Whether a turn came that rows which are still dense join with the budget."""
        self._window: Tensor | None = None
        self._scaling = 1.0

    # -- transformers' interface ------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.account.device = self.device.type
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; the keys returned lead the attention function back to this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._reopen()
        self._compress_again(key_states.shape[-2])
        self._seen += key_states.shape[-2]
        if self.ragged is not None:
            if self.ragged.append(key_states.detach(), value_states.detach()):
                self._measure()
            return mark(key_states, self), value_states
        if self.parked is not None:
            self.keys, self.values = self.parked.extended(key_states, value_states)
        elif self.keys is None:
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        else:
            assert self.values is not None
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        self._measure()
        return mark(self.keys, self), self.values

    def get_seq_length(self) -> int:
        """Logical length: positions depend on it."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask over logical positions."""
        return self._seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self.is_initialized = False
        fresh = LayerAccount(self.account.layer)
        vars(self.account).update(vars(fresh))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers passes it).

        Raises CompressionError when the cut would reach into what is compressed.
        """
        count = -int(tokens_to_remove)  # a tensor in older releases
        if count < 0:
            raise CompressionError("crop takes minus the number of tokens to remove")
        if count == 0 or not self.is_initialized:
            return
        if self.ragged is None:
            if self.parked is not None:
                raise CompressionError("a prompt cannot be cropped between its prefill chunks")
            super().crop(-count)
            if self.keys is not None and self.values is not None:  # views hold what is forgotten
                self.keys, self.values = self.keys.clone(), self.values.clone()
        elif count > self.ragged.tail:
            raise CompressionError(
                f"cannot remove {count} tokens: only the {self.ragged.tail} tokens since the last "
                "compression can be cropped; start a new cache, or use compress_every=0"
            )
        else:
            self.ragged.drop_last(count)
        self._seen -= count
        if self._window is not None:
            left = self._window.shape[2] - count
            self._window = self._window[:, :, :left].clone() if left > 0 else None
        self._measure()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder batch rows for beam search."""
        self.take_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.take_rows(row_list(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = range(len(self._shared.starts) // repeats)
        self.take_rows([row for row in rows for _ in range(repeats)])

    def take_rows(self, rows: list[int]) -> None:
        """Reorder, drop or repeat batch rows; `Conversation.take_rows` comes first."""
        if self.ragged is not None:
            self.ragged.take_rows(rows)
            self.account.reason = reasons([row.plan for row in self.ragged.rows])
        elif self.parked is not None:
            raise CompressionError("batch rows cannot change between the chunks of a prefill")
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if self._window is not None:
            self._window = self._window[rows]
        self._measure()

    # -- steps that the device takes by itself (runtime.graph) --------------------------------

    @property
    def quiet_steps(self) -> int:
        """Steps that change tensors alone: until the next compression, or until queries are kept
        for it. Queries that are kept in full move up in place."""
        if not self._shared.planner.options.compress_every:
            return QUIET
        keep = self._shared.planner.profile.keep.window
        full = self._window is not None and self._window.shape[2] == keep
        left = self._left if self.ragged is None else min(self._left, self.ragged.spare)
        return left if full else min(left, self._left - NEAR * keep)

    @property
    def _left(self) -> int:
        """Tokens that may come before the next compression or decision."""
        until = self._until if self.ragged is None else self.ragged.until
        return until - self._seen

    @property
    def _is_near(self) -> bool:
        """Whether the next compression will look at queries from now on."""
        options = self._shared.planner.options
        near = self._left < NEAR * self._shared.planner.profile.keep.window
        return bool(options.compress_every) and near

    def reserve(self, tokens: int) -> None:
        """Make room in compressed storage."""
        assert self.ragged is not None
        self.ragged.reserve(tokens)
        self._measure()

    def advance(self, steps: int) -> None:
        """Book steps taken (or, below 0, not taken)."""
        assert self.ragged is not None
        self._seen += steps
        self.ragged.advance(steps)

    # -- attention --------------------------------------------------------------------------

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Dense attention and then, maybe, compression; or attention over what is resident."""
        self._scaling = call.scaling
        rows = call.query.shape[2]
        self._note_turn(rows)
        if self.ragged is not None:
            self._remember(call.query)
            return self._attend_kept(call), None
        result = call.dense()
        self._remember(call.query)
        goal = self._shared.goal
        last = rows > 1 if goal is None else self._seen >= goal
        first = last and not (self._complete or self._reopened)
        if self.number == 0 and (first or not self._shared.starts):
            self._shared.observe_rows(call.mask, call.query.shape[0], rows, self._seen)
        elif self.number == 0 and (self._complete or self._reopened):
            self._shared.look_dense(call.mask, rows, self._seen)
        if not self._complete and last:
            self._complete = True
            self._compress(goal or self._seen, self._shared.planner.options.strict)
        elif not self._complete and goal is None:
            self.account.state, self.account.reason = "dense", "no pass of several tokens yet"
        elif not self._complete:
            self._wait()
        return result

    def _attend_kept(self, call: AttentionCall) -> Tensor:
        """Attention over what is kept, of what the mask shows."""
        assert self.ragged is not None
        shared, rows, new = self._shared, call.query.shape[0], call.query.shape[2]
        view = shared.look(call.mask, new, self._seen, begins=self.number == 0)
        if view is not None:
            return attend_seeing(self.ragged, call.query, view)
        if new == 1:
            return self.ragged.attend_one(call.query)
        own = own_block(call.mask, rows, new, self._seen, call.query.device)
        return self.ragged.attend_many(call.query, own)

    def adopt(
        self, call: AttentionCall, plans: tuple[HeadPlan, ...], given: Mapping[int, Packed]
    ) -> None:
        """Compress a whole prompt (a batch of one) by these plans, whatever the planner says, as if
        all layers had them.

        Heads in `given` hold what they are given. For comparisons of methods.
        """
        assert self.keys is not None
        assert self.values is not None
        assert call.query.shape[0] == 1
        self._scaling, self._complete = call.scaling, True
        if self.number == 0:
            self._shared.observe_rows(None, 1, self._seen, self._seen)
        plan = RowPlan(self._seen, 1.0, (plans,) * self._shared.grid.layers)
        self.ragged = RaggedLayer.compress(
            self._shared, self.number, self.account, [plan], call.query.detach(),
            self.keys.detach(), self.values.detach(), self._seen, self._scaling, given,
        )  # fmt: skip
        self.keys = self.values = None
        self.account.state, self.account.reason = "compressed", ""
        self._measure()

    def _wait(self) -> None:
        """Between the chunks of a prefill, dense keys and values wait on the host."""
        planner, goal = self._shared.planner, self._shared.goal
        self.account.state, self.account.reason = "dense", "the prompt is not complete yet"
        assert self.keys is not None
        assert self.values is not None
        assert goal is not None
        if planner.keeps_everything or goal < planner.options.min_tokens:
            return
        if self.parked is None:
            self.parked = ParkedPrompt.start(self.keys, goal)
        self.parked.take(self.keys, self.values)
        self.keys = self.values = None
        self._measure()

    def _reopen(self) -> None:
        """A prompt that goes on while all is still dense is planned as a whole."""
        goal = self._shared.goal
        if self._complete and self.ragged is None and goal is not None and self._seen < goal:
            self._complete, self._reopened = False, True

    def _note_turn(self, new: int) -> None:
        """Without compress_every what is generated stays whole; a turn of a conversation whose rows
        are still dense is prompt, and joins at the start of the next pass (it may be guesses)."""
        shared = self._shared
        if not self._complete or shared.planner.options.compress_every:
            return
        asked = self._seen - new < (shared.goal or 0) if shared.generating else new > 1
        dense = [self._until]
        if self.ragged is not None:
            dense = [row.until for row in self.ragged.rows if row.is_whole]
        self._owed |= asked and self._seen >= min(dense, default=QUIET)

    def _compress_again(self, new: int) -> None:
        """At the start of a pass of `new` tokens: is it time for those before it?"""
        if self._window is None:
            return
        if not (self._owed or self._shared.planner.options.compress_every):
            return
        if self._shared.goal is not None and not self._complete:
            return
        self._owed = False
        if self.ragged is None:
            if self._seen >= self._until:
                self._complete = True
                self._compress(self._seen, strict=False)
            return
        if not any(row.is_due(self._seen, new) for row in self.ragged.rows):
            return
        held = self.account.resident_bytes
        self.ragged.compress_tail(self._window, new)
        self.account.reason = reasons([row.plan for row in self.ragged.rows])
        self._shared.meter.set(self.number, held + self.account.resident_bytes)
        self._forget()
        self._measure()

    def _compress(self, tokens: int, strict: bool) -> None:
        """Compress the first `tokens` positions, unless the plans say to stay dense."""
        assert self.keys is not None
        assert self.values is not None
        assert self._window is not None
        size = self.keys.element_size()
        plans = self._shared.plans(tokens, size, strict)
        self.account.reason = reasons(plans)
        if all(plan.dense_reason for plan in plans):
            self._stay_dense(plans, tokens, size)
            return
        beyond = self._seen - tokens  # guesses of assisted decoding are no part of the prompt
        window = self._window[:, :, : self._window.shape[2] - beyond]
        dense = self.account.resident_bytes
        self.ragged = RaggedLayer.compress(
            self._shared, self.number, self.account, plans, window,
            self.keys.detach(), self.values.detach(), tokens, self._scaling,
        )  # fmt: skip
        self._shared.meter.set(self.number, dense + self.account.resident_bytes)
        self.keys = self.values = self.parked = None
        self.account.state = "compressed"
        self._forget()
        self._measure()

    def _stay_dense(self, plans: Sequence[RowPlan], tokens: int, size: int) -> None:
        """All rows do; note when to decide again."""
        lengths, planner = self._shared.lengths(tokens), self._shared.planner
        rows = [
            Row.first(planner, plan, row, lengths, size, tokens) for row, plan in enumerate(plans)
        ]
        self.account.state, self._until = "dense", min(row.until for row in rows)
        if self.parked is not None:  # views of the room for the prompt
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.parked = None
        self._forget()
        self._measure()

    def _forget(self) -> None:
        """Drop the queries kept, unless the next compression is so near that it needs them, too."""
        if not self._is_near:
            self._window = None

    def _remember(self, query: Tensor) -> None:
        """Keep the queries of the last rows that the next compression will look at."""
        keep = self._shared.planner.profile.keep.window
        if self._complete:
            if not (self._is_near or self._owed):
                return
        else:
            # A pass may go beyond the prompt, by what assisted decoding guesses.
            keep += max(0, self._seen - (self._shared.goal or self._seen))
        rows = query.detach()[:, :, -keep:]
        if self._window is not None and rows.shape[2] < keep:
            if self._window.shape[2] == keep:  # in place, so that a graph may do it
                moved = torch.cat([self._window[:, :, rows.shape[2] :], rows], dim=2)
                self._window.copy_(moved)
                return
            rows = torch.cat([self._window, rows], dim=2)[:, :, -keep:]
        self._window = rows.clone()
        if self._complete:
            self._measure()

    # -- bytes ------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Bytes of this layer, from shapes and from what the ragged layer accounted for."""
        window = 0 if self._window is None else self._window.untyped_storage().nbytes()
        self.account.query_bytes = window
        if self.ragged is not None:
            self.ragged.measure()
            self.account.parked_bytes = 0
        elif self.is_whole:
            assert self.keys is not None
            assert self.values is not None
            if self.account.state == "empty":
                self.account.state = "pending"
            held = self.keys.nbytes + self.values.nbytes
            self.account.dense_bytes = self.account.resident_bytes = held
            self.account.budget_bytes = held
        elif self.parked is not None:
            self.account.resident_bytes = 0
            self.account.parked_bytes = self.parked.nbytes
        self._shared.meter.set(self.number, self.account.resident_bytes)


def row_list(indices: Tensor) -> list[int]:
    """Row numbers from a mask or an index."""
    rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
    return [int(row) for row in rows.tolist()]
