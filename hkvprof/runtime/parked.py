"""Dense keys and values of a prompt that comes in several chunks, waiting on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.runtime.host import allocate

_ADVICE = "or lower the batch"


@dataclass
class ParkedPrompt:
    """One layer's prompt so far, so that between chunks no dense K/V is on the device.

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
        """Host bytes."""
        return self.data.untyped_storage().nbytes()
