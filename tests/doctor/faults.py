"""Realistic ways to break the integration, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface

from hkvprof.models import adapter, attention
from hkvprof.models.architectures import Adapter
from hkvprof.runtime import packing, prompt, ragged
from hkvprof.runtime.binding import Binding
from hkvprof.runtime.cache import CompressedCache
from hkvprof.runtime.kernels import QuantisedRows
from hkvprof.runtime.kernels.reference import TorchKernels, TorchRetrieval
from hkvprof.runtime.layer import CompressedLayer
from hkvprof.runtime.layer_states import ParkedPrompt
from hkvprof.runtime.plan import Planner
from hkvprof.runtime.prompt import Conversation
from hkvprof.runtime.ragged import RaggedLayer
from hkvprof.runtime.retrieval import Retriever
from hkvprof.runtime.storage import DynamicHead, HostChunks
from hkvprof.selection.residents import Residents

Fault = Callable[[pytest.MonkeyPatch], None]
LEAKED: list[Tensor] = []


def no_mask_registration(patch: pytest.MonkeyPatch) -> None:
    attention._register("sdpa")
    patch.delitem(AttentionMaskInterface._global_mapping, "hkvprof_sdpa")


def stored_length_as_logical(patch: pytest.MonkeyPatch) -> None:
    def stored(self: CompressedLayer) -> int:
        return self._seen if self.ragged is None else max(self.ragged.storage.lengths)

    patch.setattr(CompressedLayer, "get_seq_length", stored)


def stored_length_in_masks(patch: pytest.MonkeyPatch) -> None:
    def sizes(self: CompressedLayer, new: int) -> tuple[int, int]:
        stored = self._seen if self.ragged is None else max(self.ragged.storage.lengths)
        return stored + new, 0

    patch.setattr(CompressedLayer, "get_mask_sizes", sizes)


def rope_deltas_not_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Binding, "_place_rope_deltas", lambda self, cache: None)


def rope_deltas_lost(patch: pytest.MonkeyPatch) -> None:
    def put(self: Binding, cache: CompressedCache) -> None:
        if cache.get_seq_length() > 0:
            self.model.model.rope_deltas = torch.zeros_like(self.model.model.rope_deltas)

    patch.setattr(Binding, "_place_rope_deltas", put)


def heads_grouped_by_remainder(patch: pytest.MonkeyPatch) -> None:
    """Query head h reads KV head h % kv_heads instead of h // group."""
    own = RaggedLayer.attend_one

    def attend_one(self: RaggedLayer, query: Tensor) -> Tensor:
        heads = query.shape[1]
        order = torch.arange(heads).view(-1, self.kv_heads).T.reshape(-1)
        found = own(self, query[:, order])
        return found[:, :, order.argsort()]

    patch.setattr(RaggedLayer, "attend_one", attend_one)


def scores_of_another_group(patch: pytest.MonkeyPatch) -> None:
    def group(self: RaggedLayer, head: int) -> slice:
        return slice(head, head + self._shared.grid.group)

    patch.setattr(RaggedLayer, "_group", group)


def layers_reversed(patch: pytest.MonkeyPatch) -> None:
    own = Adapter.full_attention_layers
    patch.setattr(Adapter, "full_attention_layers", lambda self, config: own(self, config)[::-1])


def plans_of_the_next_layer(patch: pytest.MonkeyPatch) -> None:
    own = Planner.rows

    def rows(self: Planner, *args: Any) -> Any:
        return [
            replace(plan, layers=(*plan.layers[1:], *plan.layers[:1])) for plan in own(self, *args)
        ]

    patch.setattr(Planner, "rows", rows)


def kept_tokens_off_by_one(patch: pytest.MonkeyPatch) -> None:
    own = packing.select_tokens

    def select(ranking: Tensor, *args: Any) -> Tensor:
        return (own(ranking, *args) + 1).clamp(max=len(ranking) - 1)

    patch.setattr(packing, "select_tokens", select)


def kept_tokens_by_rank(patch: pytest.MonkeyPatch) -> None:
    """Ranks taken for token numbers: the inverse permutation."""
    own = packing.rank_tokens
    patch.setattr(packing, "rank_tokens", lambda *args: own(*args).argsort(dim=-1))


def values_of_the_next_token(patch: pytest.MonkeyPatch) -> None:
    own = packing.repack_static

    def repack(*args: Any) -> Any:
        packed = own(*args)
        return replace(packed, value=packed.value.roll(1, dims=0))

    patch.setattr(packing, "repack_static", repack)


def starts_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prompt, "row_starts", lambda mask, rows, new, seen: (0,) * rows)


def reset_forgets_nothing_but_keys(patch: pytest.MonkeyPatch) -> None:
    own = CompressedLayer.reset

    def reset(self: CompressedLayer) -> None:
        seen = self._seen
        own(self)
        self._seen = seen

    patch.setattr(CompressedLayer, "reset", reset)


def retrieval_bound_to_old_storage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Retriever, "unbind", Retriever.join)


def beams_share_a_slot_map(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DynamicHead, "clone", lambda self: replace(self))


def rows_stay_where_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompressedLayer, "take_rows", lambda self, rows: None)


def keys_and_values_swapped_on_the_host(patch: pytest.MonkeyPatch) -> None:
    own = HostChunks.store.__func__

    def store(cls: Any, key: Tensor, value: Tensor, *args: Any) -> Any:
        return own(cls, value, key, *args)

    patch.setattr(HostChunks, "store", classmethod(store))


def keys_and_values_swapped_when_fetched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ragged, "for_device", lambda device, dtype: TorchKernels())
    own = TorchRetrieval._items
    patch.setattr(
        TorchRetrieval, "_items", lambda self, head, items: own(self, head, items).flip(1)
    )


def slots_not_updated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ragged, "for_device", lambda device, dtype: TorchKernels())
    own = TorchRetrieval._load

    def load(self: TorchRetrieval, head: Any, score: Tensor) -> int:
        slots = head.slots.clone()
        count = own(self, head, score)
        head.slots.copy_(slots)
        return count

    patch.setattr(TorchRetrieval, "_load", load)


def worst_chunks_fetched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ragged, "for_device", lambda device, dtype: TorchKernels())
    own = TorchRetrieval._score
    patch.setattr(TorchRetrieval, "_score", lambda self, head, query: -own(self, head, query))


def means_of_the_next_segment(patch: pytest.MonkeyPatch) -> None:
    own = QuantisedRows.at

    def at(self: QuantisedRows, number: int) -> Residents:
        return replace(own(self, number), mean=self.mean[(number + 1) % len(self.mean)])

    patch.setattr(QuantisedRows, "at", at)


def rows_quantised_without_rotation(patch: pytest.MonkeyPatch) -> None:
    """When more tokens join, and not when they are read."""
    patch.setattr(Residents, "encode", lambda self, key, value: self.format.encode(key, value))


def wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    own = CompressedLayer.attend

    def attend(self: CompressedLayer, call: Any) -> Any:
        return own(self, replace(call, scaling=1 / call.query.shape[-1]))

    patch.setattr(CompressedLayer, "attend", attend)


def tail_pruned_by_other_queries(patch: pytest.MonkeyPatch) -> None:
    """Generated tokens join the budget by queries of another row of the window."""
    own = RaggedLayer.compress_tail
    patch.setattr(
        RaggedLayer, "compress_tail", lambda self, query, new: own(self, query.flip(1), new)
    )


def later_tokens_are_seen(patch: pytest.MonkeyPatch) -> None:
    def all_of_them(mask: Tensor | None, rows: int, new: int, *rest: Any) -> Tensor:
        return torch.ones(rows, new, new, dtype=torch.bool)

    patch.setattr(ragged, "own_block", all_of_them)


def dense_keys_kept_by_the_layer(patch: pytest.MonkeyPatch) -> None:
    own = CompressedLayer._compress

    def compress(self: CompressedLayer, *args: Any, **kwargs: Any) -> None:
        self.former = self.keys if self.number == 0 else None  # type: ignore[attr-defined]
        own(self, *args, **kwargs)

    patch.setattr(CompressedLayer, "_compress", compress)


def dense_keys_kept_elsewhere(patch: pytest.MonkeyPatch) -> None:
    own = CompressedLayer._compress
    LEAKED.clear()

    def compress(self: CompressedLayer, *args: Any, **kwargs: Any) -> None:
        assert self.keys is not None
        if self.number == 0:
            LEAKED.append(self.keys)
        own(self, *args, **kwargs)

    patch.setattr(CompressedLayer, "_compress", compress)


def guesses_not_cropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompressedLayer, "crop", lambda self, count: None)


def a_chunk_in_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    own = ParkedPrompt.take

    def take(self: ParkedPrompt, key: Tensor, value: Tensor) -> None:
        own(self, key, value)
        self.data[0, :, :, : self.tokens] = self.data[0, :, :, : self.tokens].flip(2)

    patch.setattr(ParkedPrompt, "take", take)


def detach_leaves_the_attention(patch: pytest.MonkeyPatch) -> None:
    """And what is left halves the attention's output."""
    own = attention.hook_attention

    def hook(model: Any) -> Callable[[], None]:
        restore = own(model)

        def partly() -> None:
            restore()
            weight = adapter.view_model(model).output_projection(0)
            weight.data *= 0.5

        return partly

    from hkvprof.runtime import binding

    patch.setattr(binding, "hook_attention", hook)


def conversations_share_their_starts(patch: pytest.MonkeyPatch) -> None:
    """A class attribute where an instance's was meant: rows' starts of the former request."""
    held: dict[str, Any] = {}
    own = Conversation.observe_rows

    def observe(self: Conversation, mask: Tensor | None, rows: int, new: int, seen: int) -> None:
        own(self, mask, rows, new, seen)
        self.starts = held.setdefault("starts", self.starts)[:rows]

    patch.setattr(Conversation, "observe_rows", observe)


@contextmanager
def seeded(fault: Fault) -> Iterator[None]:
    """The fault, within."""
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        yield
    LEAKED.clear()
