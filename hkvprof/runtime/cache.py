"""The compressed cache: transformers' DynamicCache with covered layers replaced by ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from hkvprof.errors import CompressionError, ModelError
from hkvprof.heads import HeadGrid
from hkvprof.models.attention import AttentionCall, mark
from hkvprof.runtime.attention import attend
from hkvprof.runtime.host import DynamicHead
from hkvprof.runtime.packing import RowPacker
from hkvprof.runtime.plan import Planner
from hkvprof.runtime.prompt import Conversation, Prompt
from hkvprof.runtime.receipt import HeadAccount, LayerAccount, Receipt
from hkvprof.runtime.storage import RaggedStorage


class CompressedLayer(DynamicLayer):
    """Dense during the first multi-token pass, compressed as soon as its attention is done.

    A layer whose plan says so (budget 1.0, short prompt) stays dense and behaves bit for bit as
    the stock layer.
    """

    keys: Tensor | None
    values: Tensor | None

    shared_attributes = ("_shared",)
    """Not this layer's own memory (see receipt.measure_storage)."""

    def __init__(self, number: int, shared: Conversation) -> None:
        super().__init__()
        self.number = number
        self.account = LayerAccount(shared.layer_ids[number])
        self.storage: RaggedStorage | None = None
        self.dynamic: dict[int, DynamicHead] = {}
        self._shared = shared
        self._seen = 0

    # -- transformers' interface ------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; the keys returned lead the attention function back to this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._seen += key_states.shape[-2]
        if self.storage is not None:
            self._append(self.storage, key_states.detach(), value_states.detach())
            return mark(key_states, self), value_states
        if self.keys is None:
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        else:
            assert self.values is not None
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        self._account_dense()
        return mark(self.keys, self), self.values

    def get_seq_length(self) -> int:
        """Logical length: positions depend on it."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask over logical positions."""
        return self._seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.storage = None
        self.dynamic = {}
        self.is_initialized = False
        self._seen = 0
        self.account.state, self.account.reason, self.account.heads = "empty", "", []
        self.account.dense_bytes = self.account.resident_bytes = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number, as transformers passes it).

        Raises CompressionError when the cut would reach into the compressed prompt.
        """
        count = -tokens_to_remove
        if count < 0:
            raise CompressionError("crop takes minus the number of tokens to remove")
        if count == 0 or not self.is_initialized:
            return
        if self.storage is None:
            super().crop(tokens_to_remove)
            self._seen -= count
            self._account_dense()
            return
        tail = self._seen - self._shared.prompt.tokens
        if count > tail:
            raise CompressionError(
                f"cannot remove {count} tokens: only the {tail} tokens after the compressed prompt "
                "can be cropped; start a new cache instead"
            )
        self.storage.drop_last(count)
        self._seen -= count
        self._account_storage(self.storage)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder batch rows for beam search."""
        self._take_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self._take_rows(_row_list(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._take_rows([row for row in range(self._rows) for _ in range(repeats)])

    # -- attention --------------------------------------------------------------------------

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Dense attention and then compression, or attention over the compressed storage."""
        if self.storage is not None:
            return self._attend_compressed(self.storage, call), None
        result = call.dense()
        if call.query.shape[2] > 1:
            self._compress(call)
        elif self.account.state == "pending":
            self.account.state, self.account.reason = "dense", "no pass of several tokens yet"
        return result

    def _compress(self, call: AttentionCall) -> None:
        assert self.keys is not None
        assert self.values is not None
        prompt = self._shared.describe_prompt(self.keys, call.mask)
        plan = prompt.plans[self.number]
        if plan.dense_reason:
            self.account.state, self.account.reason = "dense", plan.dense_reason
            return
        key, value, query = self.keys.detach(), self.values.detach(), call.query.detach()
        kept_keys: list[Tensor] = []
        kept_values: list[Tensor] = []
        dynamic: dict[int, DynamicHead] = {}
        accounts: list[HeadAccount] = []
        for row, start in enumerate(prompt.starts):
            packer = RowPacker(self._shared, self.number, row, start, call.scaling)
            for head, head_plan in enumerate(plan.heads):
                kept, state, name = packer.pack(query, key, value, head, head_plan)
                if state is not None:
                    dynamic[row * len(plan.heads) + head] = state
                kept_keys.append(kept[0])
                kept_values.append(kept[1])
                accounts.append(HeadAccount(row, head, name, key.shape[2] - start, len(kept[0]), 0))
        self.storage = RaggedStorage(kept_keys, kept_values)
        self.dynamic = dynamic
        self.keys = self.values = None
        self.account.state, self.account.reason, self.account.heads = "compressed", "", accounts
        self._account_storage(self.storage)

    def _attend_compressed(self, storage: RaggedStorage, call: AttentionCall) -> Tensor:
        batch, query_heads, rows, dim = call.query.shape
        kv_heads = self._shared.grid.kv_heads
        grouped = call.query.reshape(batch * kv_heads, query_heads // kv_heads, rows, dim)
        new = self._new_token_mask(call.mask, rows) if rows > 1 else None
        outputs = []
        for segment in range(storage.segments):
            head = self.dynamic.get(segment)
            query = grouped[segment]
            if head is not None and rows == 1:
                self._refresh(storage, segment, head, query[:, 0], call.scaling)
            key, value = storage.keys(segment), storage.values(segment)
            if head is not None and rows > 1:
                key, value = _with_host(head, key, value)
            block = None if new is None else new[segment // kv_heads]
            outputs.append(attend(query, key, value, call.scaling, block))
        out = torch.stack(outputs).view(batch, query_heads, rows, -1)
        return out.transpose(1, 2).contiguous()

    def _refresh(
        self, storage: RaggedStorage, segment: int, head: DynamicHead, query: Tensor, scaling: float
    ) -> None:
        layout = head.layout
        begin = layout.sinks + layout.recent
        hot = slice(begin, begin + layout.hot * layout.chunk)
        fetched = head.refresh(
            query.detach(), scaling, storage.keys(segment)[hot], storage.values(segment)[hot]
        )
        account = self.account.heads[segment]
        account.chunks_requested += layout.hot
        account.chunks_fetched += fetched

    def _new_token_mask(self, mask: Tensor | None, rows: int) -> Tensor:
        """Which of this pass's tokens every row may see, [batch, rows, rows]."""
        if mask is None or mask.ndim != 4:
            causal = torch.ones(rows, rows, dtype=torch.bool, device=self.device).tril()
            return causal.expand(self._rows, rows, rows)
        block = mask[:, 0, :, -rows:]
        block = block if block.dtype == torch.bool else block == 0
        if self.number == 0 and not bool(block[:, -1].all()):
            raise ModelError(
                "padding inside a later turn is not supported: give rows of equal length after the "
                "first turn, or run the conversations one by one"
            )
        return block.expand(self._rows, rows, rows)

    # -- rows, bytes ------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        if self.storage is not None:
            return self.storage.segments // self._shared.grid.kv_heads
        return 0 if self.keys is None else self.keys.shape[0]

    def _append(self, storage: RaggedStorage, key: Tensor, value: Tensor) -> None:
        before = storage.key
        storage.append(key.flatten(0, 1), value.flatten(0, 1))
        if storage.key is not before:
            self._account_storage(storage)
            return
        count = key.shape[2]
        self.account.dense_bytes += self.account.dense_bytes // (self._seen - count) * count
        for head in self.account.heads:
            head.tokens_seen += count
            head.tokens_resident += count

    def _take_rows(self, rows: list[int]) -> None:
        if self.storage is None:
            if self.keys is not None and self.values is not None:
                self.keys, self.values = self.keys[rows], self.values[rows]
                self._account_dense()
            return
        heads = self._shared.grid.kv_heads
        segments = [row * heads + head for row in rows for head in range(heads)]
        self.storage = self.storage.take(segments)
        old, accounts = self.dynamic, self.account.heads
        self.dynamic = {i: old[s].clone() for i, s in enumerate(segments) if s in old}
        self.account.heads = [
            HeadAccount(**{**vars(accounts[s]), "row": i // heads}) for i, s in enumerate(segments)
        ]
        self._account_storage(self.storage)

    def _account_dense(self) -> None:
        if self.keys is not None and self.values is not None:
            self.account.state = self.account.state if self.account.state == "dense" else "pending"
            size = sum(t.untyped_storage().nbytes() for t in (self.keys, self.values))
            self.account.resident_bytes = self.account.dense_bytes = size

    def _account_storage(self, storage: RaggedStorage) -> None:
        """Bytes of the layer and of every head, from lengths kept on the host."""
        key, value = storage.key, storage.value
        token_bytes = key.shape[1] * key.element_size() + value.shape[1] * value.element_size()
        tail = self._seen - self._shared.prompt.tokens
        self.account.dense_bytes = (
            self._rows * self._shared.grid.kv_heads * self._seen * token_bytes
        )
        total = 0
        counted: set[int] = set()  # rows of a beam share index and host chunks
        for segment, head in enumerate(self.account.heads):
            state = self.dynamic.get(segment)
            head.tokens_resident = storage.lengths[segment]
            head.tokens_seen = (
                self._shared.prompt.tokens - self._shared.prompt.starts[head.row] + tail
            )
            head.resident_bytes = storage.capacities[segment] * token_bytes + 8
            if state is not None:
                first = id(state.host) not in counted
                counted.add(id(state.host))
                head.resident_bytes += state.slot_bytes + (state.index_bytes if first else 0)
                head.host_bytes = state.host.nbytes if first else 0
            total += head.resident_bytes
        self.account.resident_bytes = total


def _with_host(head: DynamicHead, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a dynamic head: resident ones without the hot copies, and every host chunk."""
    begin = head.layout.sinks + head.layout.recent
    end = begin + head.layout.hot * head.layout.chunk
    chunks = head.host.data.to(key.device)
    return (
        torch.cat([key[:begin], chunks[:, 0].flatten(0, 1), key[end:]]),
        torch.cat([value[:begin], chunks[:, 1].flatten(0, 1), value[end:]]),
    )


class CompressedCache(DynamicCache):
    """A cache for one conversation (or a batch of them). Make it with `Handle.new_cache()`."""

    layers: list[Any]

    def __init__(
        self, planner: Planner, grid: HeadGrid, layer_ids: tuple[int, ...], text_config: Any
    ) -> None:
        super().__init__(config=text_config)
        self.conversation = Conversation(planner, grid, layer_ids)
        self.covered = tuple(CompressedLayer(i, self.conversation) for i in range(len(layer_ids)))
        replaced: dict[int, CacheLayerMixin] = dict(zip(layer_ids, self.covered, strict=True))
        count = max(len(self.layers), max(layer_ids) + 1)
        self.layers = [replaced.get(i) or self.layers[i] for i in range(count)]

    def receipt(self) -> Receipt:
        """What is kept now, where, and what it cost."""
        accounts = [layer.account for layer in self.covered]
        return make_receipt(accounts, self.conversation.planner)

    def check_compressed(self) -> None:
        """Raise CompressionError if a covered layer neither compressed nor says why it did not."""
        silent = [layer.account.layer for layer in self.covered if layer.account.state == "pending"]
        if silent:
            raise CompressionError(
                f"layers {silent} were not compressed although the profile covers them: their "
                "attention did not pass through hkvprof. This architecture is not supported: "
                "please report it with the model's name and `pip show transformers`"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder batch rows for beam search."""
        self.conversation.take_rows(beam_idx.tolist())
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = range(len(self.conversation.prompt.starts))
        self.conversation.take_rows([row for row in rows for _ in range(repeats)])
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.conversation.take_rows(_row_list(indices))
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything, ready for a new prompt."""
        super().reset()
        self.conversation.prompt = Prompt()
        self.conversation.rope_deltas = self.conversation.token_ids = None


def _row_list(indices: Tensor) -> list[int]:
    rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
    return [int(row) for row in rows.tolist()]


def make_receipt(accounts: list[LayerAccount], planner: Planner) -> Receipt:
    """Sum up layers' accounts."""
    return Receipt(
        resident_bytes=sum(a.resident_bytes for a in accounts),
        host_bytes=sum(a.host_bytes for a in accounts),
        dense_bytes=sum(a.dense_bytes for a in accounts),
        shared_bytes=planner.shared_bytes,
        same_memory=not torch.cuda.is_available(),
        layers=tuple(accounts),
    )
