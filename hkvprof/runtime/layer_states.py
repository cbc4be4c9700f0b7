"""How a layer holds its tokens: a class per state, each with its way into the next.

    DenseTokens --wait--> WaitingPrompt       between the chunks of a prompt
    WaitingPrompt --stay--> DenseTokens       the prompt is complete, and its plan is to be dense
    DenseTokens, WaitingPrompt --compress--> RaggedLayer (runtime.ragged)

`runtime.layer` decides when; a state answers for its tensors, and for their bytes in the account.
All have `append`, `attend`, `drop_last`, `take_rows`, `until` and `absent`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.models.attention import AttentionCall
from hkvprof.runtime.accounts import LayerAccount, LayerState
from hkvprof.runtime.copies import LiveState
from hkvprof.runtime.packing import Packed
from hkvprof.runtime.plan import RowPlan, first_rows
from hkvprof.runtime.prompt import Conversation
from hkvprof.runtime.ragged import RaggedLayer
from hkvprof.runtime.storage import allocate

_ADVICE = "or lower the batch"


class DenseTokens(LiveState):
    """Post-RoPE `keys` and `values` [rows, kv_heads, tokens, dim]; None before the first token.

    `until` is the logical length up to which the layer need not decide again.
    """

    shared_attributes = ("_shared", "account")

    def __init__(self, shared: Conversation, number: int, account: LayerAccount) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.until = shared.planner.options.compress_every
        self.account = account
        self._shared, self._number = shared, number

    @property
    def absent(self) -> str:
        """Why there are no dense keys and values, or an empty text."""
        return ""

    @property
    def whole_until(self) -> int:
        """Logical length up to which rows that stay dense need not decide again."""
        return self.until

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens [rows, kv_heads, new, dim]; what their pass attends to."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key.contiguous(), value.contiguous()
        else:
            self.keys = torch.cat([self.keys, key], dim=-2)
            self.values = torch.cat([self.values, value], dim=-2)
        self.measure()
        return self.keys, self.values

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """The model's own attention."""
        return call.dense()

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens."""
        keys, values = self._both()
        # clones: views would hold what is forgotten
        self.keys, self.values = keys[..., :-count, :].clone(), values[..., :-count, :].clone()
        self.measure()

    def take_rows(self, rows: list[int]) -> None:
        """Reorder, drop or repeat batch rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]
            self.measure()

    def measure(self) -> None:
        """Account for what is on the device."""
        if self.keys is None or self.values is None:
            return
        account = self.account
        if account.state is LayerState.EMPTY:
            account.state = LayerState.PENDING
        held = self.keys.nbytes + self.values.nbytes
        account.dense_bytes = account.resident_bytes = held
        account.budget_bytes, account.parked_bytes = held, 0
        self._shared.meter.set(self._number, held)

    def wait(self, goal: int) -> WaitingPrompt:
        """A chunk of a prompt of `goal` tokens is done: on the host until the next one comes.

        Raises CompressionError when host memory cannot be had.
        """
        keys, values = self._both()
        room = ParkedPrompt.start(keys, goal)
        waiting = WaitingPrompt(self._shared, self._number, self.account, room)
        waiting.keys, waiting.values, waiting.until = keys, values, self.until
        return waiting.wait(goal)

    def stay(self, plans: Sequence[RowPlan], tokens: int) -> DenseTokens:
        """All rows stay dense by these plans at `tokens` positions; note when to decide again."""
        keys, _ = self._both()
        shared, size = self._shared, keys.element_size()
        rows = first_rows(shared.planner, plans, shared.lengths(tokens), size, tokens)
        self.until = min(row.until for row in rows)
        self.account.state = LayerState.DENSE
        self.measure()
        return self

    def compress(
        self,
        plans: Sequence[RowPlan],
        query: Float[Tensor, "rows query_heads window dim"],
        tokens: int,
        scaling: float,
        given: Mapping[int, Packed] | None = None,
    ) -> RaggedLayer:
        """The first `tokens` positions compressed; see `RaggedLayer.compress`."""
        keys, values = self._both()
        return RaggedLayer.compress(
            self._shared, self._number, self.account, plans, query, keys.detach(),
            values.detach(), tokens, scaling, given,
        )  # fmt: skip

    def _both(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


class WaitingPrompt(DenseTokens):
    """A prompt in chunks: on the host between two passes, dense on the device within one."""

    def __init__(
        self, shared: Conversation, number: int, account: LayerAccount, room: ParkedPrompt
    ) -> None:
        super().__init__(shared, number, account)
        self._room = room

    @property
    def absent(self) -> str:
        """Why there are no dense keys and values, or an empty text."""
        return "" if self.keys is not None else "waits on the host for the next chunk of its prompt"

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next chunk; all tokens so far, on the device."""
        self.keys, self.values = self._room.extended(key, value)
        self.measure()
        return self.keys, self.values

    def drop_last(self, count: int) -> None:
        """Refused while the prompt is incomplete: raises CompressionError."""
        raise CompressionError("a prompt cannot be cropped between its prefill chunks")

    def take_rows(self, rows: list[int]) -> None:
        """Refused while the prompt is incomplete: raises CompressionError."""
        raise CompressionError("batch rows cannot change between the chunks of a prefill")

    def measure(self) -> None:
        """Account for what is on the device and on the host."""
        super().measure()
        if self.keys is None:
            self.account.resident_bytes = 0
            self._shared.meter.set(self._number, 0)
        self.account.parked_bytes = self._room.nbytes

    def wait(self, goal: int) -> WaitingPrompt:
        """This chunk is done: back to the host."""
        self._room.take(*self._both())
        self.keys = self.values = None
        self.measure()
        return self

    def stay(self, plans: Sequence[RowPlan], tokens: int) -> DenseTokens:
        """The prompt is complete and stays dense."""
        keys, values = self._both()
        dense = DenseTokens(self._shared, self._number, self.account)
        dense.keys, dense.values = keys.clone(), values.clone()  # they may be views of the room
        return dense.stay(plans, tokens)


@dataclass
class ParkedPrompt:
    """Host memory for one layer's prompt, so that between chunks no dense K/V is on the device.

    `data` [2, rows, kv_heads, goal, dim]: room for the whole prompt, K then V, of which `tokens`
    positions are filled.
    """

    data: Tensor
    tokens: int
    on_host = True

    @classmethod
    def start(cls, key: Float[Tensor, "rows kv_heads tokens dim"], goal: int) -> ParkedPrompt:
        """Room for `goal` tokens. Raises CompressionError when host memory cannot be had."""
        rows, heads, _, dim = key.shape
        room = (2, rows, heads, goal, dim)
        purpose = "one layer of a prompt in chunks"
        data = allocate(room, key.dtype, key.is_cuda, purpose, _ADVICE)
        return cls(data, 0)

    def take(self, key: Tensor, value: Tensor) -> None:
        """Store what is new in the keys and values of all positions so far."""
        new = slice(self.tokens, key.shape[2])
        if key.data_ptr() != self.data.data_ptr():
            self.data[0, :, :, new] = key[:, :, new]
            self.data[1, :, :, new] = value[:, :, new]
        self.tokens = key.shape[2]

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions and a new chunk's, on the device.

        Where host and device are one memory and the chunk fits, both are views of the room.
        """
        end = self.tokens + key.shape[2]
        if key.device == self.data.device and end <= self.data.shape[3]:
            self.data[0, :, :, self.tokens : end] = key
            self.data[1, :, :, self.tokens : end] = value
            return self.data[0, :, :, :end], self.data[1, :, :, :end]
        before = self.data[:, :, :, : self.tokens].to(key.device, non_blocking=True)
        return torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParkedPrompt:
        room, kind = tuple(self.data.shape), self.data.dtype
        data = allocate(room, kind, self.data.is_pinned(), "a copy of a prompt in chunks", _ADVICE)
        data[:, :, :, : self.tokens] = self.data[:, :, :, : self.tokens]
        return ParkedPrompt(data, self.tokens)

    @property
    def nbytes(self) -> int:
        """Host bytes, room for later chunks included."""
        return self.data.nbytes
