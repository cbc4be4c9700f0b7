"""One prefill for many methods: attention over a prompt is dense whatever keeps its cache after.

`capture` runs the model once; `fill` hands keys, values and queries of every layer to a compressed
cache as the model itself would, so that the cache compresses them. What is measured afterwards is
the product's own decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.calibration.observe import ObservedCache
from hkvprof.errors import ModelError
from hkvprof.heads import Modality
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.attention import AttentionCall, hooked_attention
from hkvprof.models.calls import last_row_only, rope_holder, with_cache
from hkvprof.models.decoder_input import DecoderInput, watch_input
from hkvprof.models.processing import Encoded
from hkvprof.models.rotary import rotary_module, watching_positions
from hkvprof.runtime import CompressedCache
from hkvprof.runtime.packing import Packed
from hkvprof.runtime.plan import HeadPlan, RowPlan


@dataclass(frozen=True)
class Prefill:
    """A prompt on a model: per covered layer the attention call with all keys and values.

    `logits` [rows, vocabulary] of the last position; `rope_deltas` are Qwen-VL's position offsets;
    `text` tells text from vision (or context) tokens, `positions` [axes, 1, tokens] are what rotary
    embeddings were told, where the model has any.
    """

    view: ModelView
    calls: tuple[AttentionCall, ...]
    logits: Tensor
    tokens: int
    ids: Tensor
    rope_deltas: Tensor | None
    text: Bool[Tensor, " tokens"]
    decoder_input: DecoderInput
    positions: Tensor | None = None

    def first(self, count: int) -> Prefill:
        """The prefill of the first `count` tokens alone, to which attention is causal.

        All vision tokens must be among them. `logits` are those of the whole prompt: use them not.
        """
        calls = tuple(
            replace(
                call, query=call.query[:, :, :count], key=call.key[:, :, :count],
                value=call.value[:, :, :count], mask=None,
            )
            for call in self.calls
        )  # fmt: skip
        return replace(
            self,
            calls=calls,
            tokens=count,
            ids=self.ids[:, :count],
            text=self.text[:count],
            decoder_input=self.decoder_input.first(count),
            positions=None if self.positions is None else self.positions[..., :count],
        )

    def dense_bytes(self, itemsize: int | None = None) -> int:
        """Bytes of all keys and values, by the bytes an element has or is to count."""
        elements = sum(call.key.numel() + call.value.numel() for call in self.calls)
        return elements * (itemsize or self.calls[0].key.element_size())

    def dense_cache(self) -> DynamicCache:
        """A full cache of transformers, with keys and values of its own."""
        cache = DynamicCache(config=self.view.text_config)
        for number, call in zip(self.view.layer_ids, self.calls, strict=True):
            cache.layers[number].update(call.key.clone(), call.value.clone())
        return cache

    def fill(self, cache: CompressedCache) -> None:
        """Let a new cache see the prompt; it compresses as it would while the model runs."""
        self._open(cache)
        for layer, call in zip(cache.covered, self.calls, strict=True):
            layer.update(call.key, call.value)
            layer.attend(call)

    def fill_with(
        self,
        cache: CompressedCache,
        plans: Sequence[tuple[HeadPlan, ...]],
        given: Sequence[Mapping[int, Packed]],
        share: float = 1.0,
    ) -> None:
        """As `fill`, but with these plans per layer, whatever the planner says; heads in `given`
        hold what they are given. `share` is what the plans were made for."""
        self._open(cache)
        cache.conversation.observe_rows(None, 1, self.tokens, self.tokens)
        for layer, call, heads, packed in zip(cache.covered, self.calls, plans, given, strict=True):
            layer.update(call.key, call.value)
            plan = RowPlan(self.tokens, share, (heads,) * len(plans))
            layer.compress_by([plan], call.query.detach(), self.tokens, call.scaling, packed)

    def restore(self, model: Any) -> None:
        """Put this prompt's position offsets on the model, for passes with a cache of its own."""
        holder = rope_holder(model)
        if holder is not None:
            holder.rope_deltas = self.rope_deltas

    def _open(self, cache: CompressedCache) -> None:
        conversation = cache.conversation
        conversation.goal = self.tokens
        conversation.see_ids(self.ids, 0)
        conversation.rope_deltas = self.rope_deltas
        if self.positions is not None:
            conversation.positions.see(self.positions, 1)


@torch.no_grad()
def capture(model: Any, encoded: Encoded) -> Prefill:
    """Run a prompt once. Raises ModelError for models with layers that no profile covers."""
    view = view_model(model)
    calls: dict[int, AttentionCall] = {}

    def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
        calls[layer] = call

    cache = ObservedCache(view, watch)
    if len(cache.covered) != len(cache.layers):
        raise ModelError(
            f"{type(model).__name__} has layers that a profile does not cover (sliding windows): "
            "its prefill cannot be shared between methods"
        )
    told: list[Tensor] = []
    asked = watching_positions(model, view, lambda positions, rows: told.append(positions))
    has_rotary = rotary_module(model, view) is not None
    with (
        hooked_attention(model),
        watch_input(model, view) as seen,
        asked if has_rotary else nullcontext(),
    ):
        inputs = encoded.to(model.device, model.dtype)
        output = model(**inputs, **with_cache(model, cache), **last_row_only(model))
    kept = [replace(calls[number], dense=_nothing) for number in range(len(cache.covered))]
    return Prefill(
        view,
        tuple(kept),
        output.logits[:, -1],
        encoded.tokens,
        inputs["input_ids"],
        getattr(rope_holder(model), "rope_deltas", None),
        (encoded.modality[0] == Modality.TEXT).to(model.device),
        seen,
        told[-1] if told else None,
    )


def _nothing() -> tuple[Any, Any]:
    """Stand in for the dense attention of a captured call, whose result is not needed any more."""
    return None, None
