"""A cache layer that is dense while the prompt comes in and compressed from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hkvprof.errors import CompressionError
from hkvprof.models.attention import AttentionCall, mark
from hkvprof.profile.costs import QUIET
from hkvprof.runtime.accounts import LayerAccount, LayerState
from hkvprof.runtime.copies import LiveState
from hkvprof.runtime.layer_states import DenseTokens
from hkvprof.runtime.packing import Packed
from hkvprof.runtime.plan import RowPlan, reasons
from hkvprof.runtime.prompt import Conversation
from hkvprof.runtime.ragged import RaggedLayer

NEAR = 2
"""Windows of tokens before a compression from which on queries are kept for it: one to fill the
window, one for steps that may be replayed (runtime.graph)."""


class CompressedLayer(LiveState, DynamicLayer):
    """Dense until the prompt is complete, compressed as soon as its attention is done then.

    `state` holds the tokens (layer_states); this class decides when it turns into the next one. A
    layer whose plan says so (budget 1.0, short prompt) stays dense and behaves bit for bit as the
    stock layer. Later compressions (`compress_every`) happen at the start of a pass, when all
    tokens in the cache are final.
    """

    shared_attributes = ("_shared", "account")
    """Not this layer's own memory (see accounts.measure_storage)."""
    query_attributes = ("_window",)
    """Queries for the next compression, which are counted by themselves."""
    state: DenseTokens | RaggedLayer

    def __init__(self, number: int, shared: Conversation) -> None:
        self.number = number
        self.account = LayerAccount(shared.layer_ids[number])
        self._shared = shared
        self._clear()
        super().__init__()

    def _clear(self) -> None:
        self.state = DenseTokens(self._shared, self.number, self.account)
        self._seen = 0
        self._complete = False
        self._reopened = False
        """Whether the prompt was complete before, and went on while all was dense."""
        self._owed = False
        """Whether a turn came that rows which are still dense join with the budget."""
        self._window: Tensor | None = None
        self._scaling = 1.0

    # -- transformers' interface ------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """Post-RoPE keys [rows, kv_heads, tokens, dim]; None before the first token.

        Raises CompressionError where there is no such tensor: once the layer is compressed, and
        between the chunks of a prompt, which wait on the host.
        """
        return self._dense("keys").keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._dense("keys").keys = keys

    @property
    def values(self) -> Tensor | None:
        """Values of all tokens; as `keys`."""
        return self._dense("values").values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._dense("values").values = values

    @property
    def is_whole(self) -> bool:
        """Whether dense keys and values are here."""
        return isinstance(self.state, DenseTokens) and self.state.keys is not None

    @property
    def is_frozen(self) -> bool:
        """Whether what is held was made under torch.inference_mode() and cannot change outside."""
        return self.ragged is not None and self.ragged.storage.key.is_inference()

    @property
    def ragged(self) -> RaggedLayer | None:
        """What is held, once that is compressed."""
        return self.state if isinstance(self.state, RaggedLayer) else None

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
        keys, values = self.state.append(key_states, value_states)
        return mark(keys, self), values

    def get_seq_length(self) -> int:
        """Logical length: positions depend on it."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask over logical positions."""
        return self._seen + query_length, 0

    def reset(self) -> None:
        """Forget the conversation, ready for a new prompt."""
        self._clear()
        self.is_initialized = False
        fresh = LayerAccount(self.account.layer)
        vars(self.account).update(vars(fresh))

    def offload(self) -> None:
        """Move dense keys and values to the CPU, as the stock layer does."""
        if self._dense("offload").keys is not None:
            super().offload()

    def prefetch(self) -> None:
        """Bring dense keys and values back to their device."""
        if self._dense("prefetch").keys is not None:
            super().prefetch()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers passes it).

        Raises CompressionError when the cut would reach into what is compressed.
        """
        count = -int(tokens_to_remove)  # a tensor in older releases
        if count < 0:
            raise CompressionError("crop takes minus the number of tokens to remove")
        if count == 0 or not self.is_initialized:
            return
        self.state.drop_last(count)
        self._seen -= count
        if self._window is not None:
            left = self._window.shape[2] - count
            self._keep_queries(self._window[:, :, :left].clone() if left > 0 else None)

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
        self.state.take_rows(rows)
        if self._window is not None:
            self._keep_queries(self._window[rows])

    def _dense(self, what: str) -> DenseTokens:
        """The state that has dense tensors; refuses `what` where there is none."""
        if self.state.absent:
            raise CompressionError(
                f"layer {self.account.layer} {self.state.absent}, so that it has no dense {what}. "
                "Use get_seq_length() for lengths, receipt() for what is kept, "
                "measure_storage(cache) for bytes, copy.deepcopy for copies, and "
                "apply(budget=1.0) or detach() where keys and values must be whole"
            )
        assert isinstance(self.state, DenseTokens)
        return self.state

    # -- steps that the device takes by itself (runtime.graph) --------------------------------

    @property
    def quiet_steps(self) -> int:
        """Steps that change tensors alone: until the next compression, or until queries are kept
        for it. Queries that are kept in full move up in place. 0 while the layer is dense."""
        if not isinstance(self.state, RaggedLayer):
            return 0
        if not self._shared.planner.options.compress_every:
            return QUIET
        keep = self._shared.planner.profile.keep.window
        full = self._window is not None and self._window.shape[2] == keep
        left = min(self._left, self.state.spare)
        return left if full else min(left, self._left - NEAR * keep)

    @property
    def _left(self) -> int:
        """Tokens that may come before the next compression or decision."""
        return self.state.until - self._seen

    @property
    def _is_near(self) -> bool:
        """Whether the next compression will look at queries from now on."""
        options = self._shared.planner.options
        near = self._left < NEAR * self._shared.planner.profile.keep.window
        return bool(options.compress_every) and near

    def reserve(self, tokens: int) -> None:
        """Make room in compressed storage."""
        assert isinstance(self.state, RaggedLayer)
        self.state.reserve(tokens)

    def advance(self, steps: int) -> None:
        """Book steps taken (or, below 0, not taken)."""
        assert isinstance(self.state, RaggedLayer)
        self._seen += steps
        self.state.advance(steps)

    # -- attention --------------------------------------------------------------------------

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Dense attention and then, maybe, compression; or attention over what is resident."""
        self._scaling = call.scaling
        self._note_turn(call.query.shape[2])
        result = self.state.attend(call)
        self._remember(call.query)
        if isinstance(self.state, DenseTokens):
            self._decide(self.state, call)
        return result

    def _decide(self, state: DenseTokens, call: AttentionCall) -> None:
        """After dense attention: is the prompt complete, and what becomes of the layer then?"""
        rows, new = call.query.shape[0], call.query.shape[2]
        goal = self._shared.goal
        last = new > 1 if goal is None else self._seen >= goal
        first = last and not (self._complete or self._reopened)
        if self.number and not self._shared.starts:
            raise CompressionError(
                f"attention of covered layer {self.number} came before that of layer 0: layers of "
                "the decoder were replaced or reordered. Give every attention module the layer_idx "
                "of its place, and apply the profile (again) after that"
            )
        if self.number == 0 and (first or not self._shared.starts):
            self._shared.observe_rows(call.mask, rows, new, self._seen)
        elif self.number == 0 and (self._complete or self._reopened):
            self._shared.look_dense(call.mask, new, self._seen)
        if self._complete:
            return
        if last:
            self._complete = True
            self._compress(goal or self._seen, self._shared.planner.options.strict)
        elif goal is None:
            self._explain("no pass of several tokens yet")
        else:
            self._explain("the prompt is not complete yet")
            planner = self._shared.planner
            if not planner.keeps_everything and goal >= planner.options.min_tokens:
                self.state = state.wait(goal)

    def _explain(self, reason: str) -> None:
        self.account.state, self.account.reason = LayerState.DENSE, reason

    def _reopen(self) -> None:
        """A prompt that goes on while all is still dense is planned as a whole."""
        goal, dense = self._shared.goal, isinstance(self.state, DenseTokens)
        if self._complete and dense and goal is not None and self._seen < goal:
            self._complete, self._reopened = False, True

    def _note_turn(self, new: int) -> None:
        """Without compress_every what is generated stays whole; a turn of a conversation whose rows
        are still dense is prompt, and joins at the start of the next pass (it may be guesses)."""
        shared = self._shared
        if not self._complete or shared.planner.options.compress_every:
            return
        asked = self._seen - new < (shared.goal or 0) if shared.generating else new > 1
        self._owed |= asked and self._seen >= self.state.whole_until

    def _compress_again(self, new: int) -> None:
        """At the start of a pass of `new` tokens: is it time for those before it?"""
        if self._window is None:
            return
        if not (self._owed or self._shared.planner.options.compress_every):
            return
        if self._shared.goal is not None and not self._complete:
            return
        self._owed = False
        if isinstance(self.state, DenseTokens):
            if self._seen >= self.state.until:
                self._complete = True
                self._compress(self._seen, strict=False)
        elif self.state.is_due(new):
            self.state.compress_tail(self._window, new)
            self._forget()

    def _compress(self, tokens: int, strict: bool) -> None:
        """Compress the first `tokens` positions, unless the plans say to stay dense."""
        assert self.keys is not None
        assert self._window is not None
        plans = self._shared.plans(tokens, self.keys.element_size(), strict)
        if all(plan.dense_reason for plan in plans):
            self.account.reason = reasons(plans)
            self.state = self._dense("keys").stay(plans, tokens)
            self._forget()
            return
        beyond = self._seen - tokens  # guesses of assisted decoding are no part of the prompt
        window = self._window[:, :, : self._window.shape[2] - beyond]
        self.compress_by(plans, window, tokens, self._scaling)

    def compress_by(
        self,
        plans: Sequence[RowPlan],
        query: Float[Tensor, "rows query_heads window dim"],
        tokens: int,
        scaling: float,
        given: Mapping[int, Packed] | None = None,
    ) -> None:
        """Compress the first `tokens` positions of a dense layer by these plans, one per row.

        `query` holds the last rows up to position `tokens`. Heads in `given` hold what they are
        given there (batches of one).
        """
        self.state = self._dense("keys").compress(plans, query, tokens, scaling, given)
        self._complete = True
        self._forget()

    # -- queries for the next compression -----------------------------------------------------

    def _forget(self) -> None:
        """Drop the queries kept, unless the next compression is so near that it needs them, too."""
        if not self._is_near:
            self._keep_queries(None)

    def _keep_queries(self, queries: Tensor | None) -> None:
        self._window = queries
        held = 0 if queries is None else queries.untyped_storage().nbytes()
        self.account.query_bytes = held

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
        self._keep_queries(rows.clone())


def row_list(indices: Tensor) -> list[int]:
    """Row numbers from a mask or an index."""
    rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
    return [int(row) for row in rows.tolist()]
