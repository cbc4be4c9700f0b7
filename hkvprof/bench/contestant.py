"""One method at work on one prompt: prefill, then decoding of given tokens, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache

from hkvprof.bench.memory import stock_bytes
from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.prompts import Prompt
from hkvprof.bench.records import Sizes
from hkvprof.models.adapter import ModelView
from hkvprof.models.calls import last_row_only, with_cache
from hkvprof.runtime import apply, measure_storage


class Contestant:
    """A method with a cache of its own. Several may be at work on one model, turn by turn.

    The model is hooked only while a compressing method runs: dense ones see the plain model.
    """

    def __init__(self, model: Any, view: ModelView, method: Method, prompt: Prompt) -> None:
        self.model = model
        self.view = view
        self.method = method
        self.prompt = prompt
        self.cache: Any = None
        self.prefill_seconds = 0.0
        self.blocks: list[list[float]] = []
        self._row_only = last_row_only(model)

    def prefill(self) -> None:
        """Read the prompt into a new cache."""
        with self._hooked() as handle:
            self.cache = self._new_cache(handle)
            self.prefill_seconds = self._forward(self.prompt.inputs)

    def decode(self, steps: int) -> None:
        """Continue with the next `steps` given tokens; notes the seconds of each as one block."""
        done = sum(map(len, self.blocks))
        assert done + steps <= self.prompt.forced.shape[1]
        with self._hooked():
            ids = self.prompt.forced[:, done : done + steps]
            self.blocks.append([self._forward({"input_ids": one}) for one in ids.split(1, dim=1)])

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of every step but the first of each block, which warms up."""
        return [seconds for block in self.blocks for seconds in block[1:]]

    @property
    def decode_seconds(self) -> float:
        """Seconds of all steps, first ones included."""
        return sum(map(sum, self.blocks))

    def receipt(self) -> Any:
        """The runtime's account, None for caches of transformers."""
        return self.cache.receipt() if self.method.kind.compresses else None

    def sizes(self) -> Sizes:
        """Bytes now, of the layers that a profile covers."""
        if self.method.kind.compresses:
            account = self.cache.receipt()
            storage, _ = measure_storage(self.cache)
            return Sizes(account.resident_bytes, storage, account.host_bytes, account.dense_bytes)
        tokens = self.prompt.tokens + sum(map(len, self.blocks))
        token_bytes = self.prompt.rows * self.view.grid.token_bytes(self.model.dtype.itemsize)
        capacity = self._capacity if self.method.kind is Kind.PREALLOCATED else tokens
        storage = stock_bytes(self.cache, self.view)
        return Sizes(capacity * token_bytes, storage, 0, tokens * token_bytes)

    @property
    def _capacity(self) -> int:
        return self.prompt.tokens + int(self.prompt.forced.shape[1])

    @contextmanager
    def _hooked(self) -> Iterator[Any]:
        """The model with the profile applied; a cache works under any handle of its model."""
        if self.method.profile is None:
            yield None
            return
        with apply(
            self.model, self.method.profile, budget=self.method.budget, min_tokens=1
        ) as handle:
            yield handle

    def _new_cache(self, handle: Any) -> Any:
        if handle is not None:
            return handle.new_cache()
        config = self.view.text_config
        if self.method.kind is Kind.PREALLOCATED:
            return StaticCache(config=config, max_cache_len=self._capacity)
        return DynamicCache(config=config)

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> float:
        """Seconds of one pass."""
        _wait(self.model.device)
        start = time.perf_counter()
        self.model(**inputs, **with_cache(self.model, self.cache), use_cache=True, **self._row_only)
        _wait(self.model.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
