"""The compressed cache: transformers' DynamicCache with covered layers replaced by ours."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from hkvprof.errors import CompressionError, UsageError
from hkvprof.heads import HeadGrid
from hkvprof.runtime import kernels
from hkvprof.runtime.accounts import POSITIONS, LayerAccount, LayerState, Meter
from hkvprof.runtime.copies import LiveState
from hkvprof.runtime.layer import CompressedLayer, row_list
from hkvprof.runtime.monitor import Watch, WatchedLayer
from hkvprof.runtime.passes import Owner, require_pass
from hkvprof.runtime.plan import Planner
from hkvprof.runtime.prompt import Conversation
from hkvprof.runtime.receipt import ONE_MEMORY, Receipt


@dataclass(frozen=True)
class Books:
    """What a receipt is made of; refers to no tensors but counters, and so outlives the cache."""

    accounts: list[LayerAccount]
    meter: Meter
    planner: Planner
    watch: Watch | None = None

    def receipt(self) -> Receipt:
        """The receipt of what the accounts say now."""
        layers = tuple(account.snapshot() for account in self.accounts)
        return Receipt(
            resident_bytes=self.meter.bytes.get(POSITIONS, 0)
            + sum(a.resident_bytes for a in layers),
            budget_bytes=int(sum(a.budget_bytes for a in layers)),
            query_bytes=sum(a.query_bytes for a in layers),
            host_bytes=sum(a.host_bytes for a in layers),
            dense_bytes=sum(a.dense_bytes for a in layers),
            peak_bytes=self.meter.peak,
            shared_bytes=self.planner.shared_bytes,
            same_memory=all(a.device in ONE_MEMORY for a in layers),
            kernels=kernels.status(),
            layers=layers,
            domain=None if self.watch is None else self.watch.verdict,
            profile=self.planner.origin,
        )


class CompressedCache(LiveState, DynamicCache):
    """A cache for one conversation (or a batch of them). Make it with `Handle.new_cache()`.

    `copy.deepcopy(cache)` branches the conversation (runtime.copies).
    """

    layers: list[Any]
    shared_in_copies = ("_text_config",)

    def __init__(
        self,
        planner: Planner,
        grid: HeadGrid,
        layer_ids: tuple[int, ...],
        text_config: Any,
        prompt_tokens: int | None = None,
        watch: Watch | None = None,
        owner: Owner | None = None,
    ) -> None:
        _keep_out_of_graphs()
        super().__init__(config=text_config)
        self.owner = owner
        self.conversation = Conversation(
            planner, grid, layer_ids, prompt_tokens, watched=watch is not None
        )
        self.covered = tuple(
            CompressedLayer(number, self.conversation)
            if watch is None
            else WatchedLayer(number, self.conversation, watch)
            for number in range(len(layer_ids))
        )
        self._watch = watch
        self._text_config = text_config
        replaced: dict[int, CacheLayerMixin] = dict(zip(layer_ids, self.covered, strict=True))
        count = max(len(self.layers), max(layer_ids) + 1)
        self.layers = [replaced.get(i) or self.layers[i] for i in range(count)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new tokens, [rows, kv_heads, new, dim].

        Raises CompressionError outside of a pass of the model that this cache was made for.
        """
        require_pass(self.owner, self.conversation)
        layer = self.layers[layer_idx]
        # Sliding layers of transformers 5.24 do not note their dtype.
        holds = getattr(layer, "dtype", key_states.dtype) if layer.is_initialized else None
        if holds not in (None, key_states.dtype):
            raise CompressionError(
                f"this cache holds {holds}, and the model now computes {key_states.dtype}: "
                "give the model its dtype back, or start a new cache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def books(self) -> Books:
        """The accounts behind the receipt."""
        accounts = [layer.account for layer in self.covered]
        return Books(accounts, self.conversation.meter, self.conversation.planner, self._watch)

    @contextmanager
    def whole_pass(self, rows: int | None) -> Iterator[None]:
        """Within: a pass with `rows` batch rows fills the cache, in all layers or in none.

        Raises CompressionError for a cache that an earlier pass left half-filled, UsageError for
        another number of rows than the cache has.
        """
        conversation = self.conversation
        if conversation.broken:
            raise CompressionError(
                f"an earlier pass of this cache did not finish ({conversation.broken}) and left "
                "it half-filled: start a new cache, or go on from a copy.deepcopy made before"
            )
        if not torch.is_inference_mode_enabled() and any(one.is_frozen for one in self.covered):
            raise CompressionError(
                "this cache was filled under torch.inference_mode(), and its tensors cannot change "
                "outside of it: go on within it, go on from copy.deepcopy(cache), or use "
                "torch.no_grad() from the start"
            )
        before, known = self.get_seq_length(), len(conversation.starts)
        if before and rows is not None and known not in (0, rows):
            raise UsageError(
                f"the cache holds {known} batch rows and the pass brings {rows}: give as many, or "
                "start a new cache"
            )
        try:
            yield
        except BaseException as error:
            if any(layer.get_seq_length() != before for layer in self.covered):
                conversation.broken = type(error).__name__
            raise

    def receipt(self) -> Receipt:
        """What is kept now, where, and what it cost."""
        return self.books.receipt()

    def check_compressed(self) -> None:
        """Raise CompressionError if a covered layer neither compressed nor says why it did not."""
        accounts = [layer.account for layer in self.covered]
        silent = [one.layer for one in accounts if one.state is LayerState.PENDING]
        if silent:
            raise CompressionError(
                f"layers {silent} were not compressed although the profile covers them: their "
                "attention did not pass through hkvprof. This architecture is not supported: "
                "please report it with the model's name and `pip show transformers`"
            )

    @property
    def quiet_steps(self) -> int:
        """Decoding steps until the host has something to decide, if the storage has the room."""
        return min(layer.quiet_steps for layer in self.covered)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in every compressed layer."""
        for layer in self.covered:
            layer.reserve(tokens)

    def advance(self, steps: int) -> None:
        """Book decoding steps that the device took by itself (runtime.graph)."""
        for layer in self.covered:
            layer.advance(steps)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder batch rows for beam search."""
        self.conversation.take_rows(beam_idx.tolist())
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        rows = range(len(self.conversation.starts))
        self.conversation.take_rows([row for row in rows for _ in range(repeats)])
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.conversation.take_rows(row_list(indices))
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything, ready for a new prompt.

        Layers that are not covered are made anew: some releases of transformers zero their tensors
        in place, and a sliding layer would go on from as many zeros.
        """
        self.conversation.reset()
        for layer in self.covered:
            layer.reset()
        fresh = DynamicCache(config=self._text_config).layers
        self.layers = [
            layer if isinstance(layer, CompressedLayer) else fresh[number]
            for number, layer in enumerate(self.layers)
        ]


@functools.cache
def _keep_out_of_graphs() -> None:
    """A cache keeps books in Python: torch.compile goes around `update`.

    With the first cache and not with this module, since torch's compiler takes seconds to import.
    """
    kept_out = torch.compiler.disable(CompressedCache.update)
    setattr(CompressedCache, "update", kept_out)  # noqa: B010 (mypy: a method)
