"""The dense caches one would really use: transformers' own, and one whose room is made at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hkvprof.runtime.graph import Recorder, take_step


class FullLayer(DynamicLayer):
    """Keys and values with room for `room` further tokens, appended at a place on the device.

    Attention goes over the whole room at every step, as SDPA's flash kernel does without a mask: a
    few tokens of thousands more than there are. transformers' StaticCache masks them instead, which
    on CUDA is slower.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, 0

    def fill(self, key: Tensor, value: Tensor) -> None:
        """The prompt [rows, kv_heads, tokens, dim]; copied."""
        self.lazy_initialization(key, value)
        rows, heads, tokens, dim = key.shape
        shape = (rows, heads, tokens + self.room, dim)
        self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        self.keys[:, :, :tokens], self.values[:, :, :tokens] = key, value
        self.seen = tokens
        self.place = torch.tensor([tokens], device=key.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One token."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        self.place += 1
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """The prompt's: positions are given, not counted."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole room."""
        return self.keys.shape[2], 0


def dense_cache(config: Any, layers: int, room: int | None) -> DynamicCache:
    """transformers' DynamicCache; with `room`, of FullLayers."""
    cache = DynamicCache(config=config)
    if room is not None:
        cache.layers = [FullLayer(room) for _ in range(layers)]
    return cache


class DenseSteps:
    """`steps(ids)`: a pass over one token per row, recorded by `recorder` after the first."""

    def __init__(self, model: Any, cache: Any, tokens: int, rows: int, recorder: Recorder | None):
        self._model, self._cache, self._recorder = model, cache, recorder
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self._positions = torch.full_like(self._ids, tokens)
        self._replay: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits that follow these tokens."""
        self._ids.copy_(ids)
        if self._replay is not None:
            return self._replay()
        out = self._step()
        if self._recorder is not None:
            self._replay = self._recorder.record(self._step)
        return out

    def _step(self) -> Tensor:
        return take_step(self._model, self._ids, self._positions, self._cache)
