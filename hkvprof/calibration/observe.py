"""Watching every KV head during a normal prefill and a teacher-forced reply.

The model attends with its own SDPA implementation; an observing cache layer is handed
queries, keys and values of one layer at a time and keeps only what calibration needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from hkvprof.models.adapter import ModelView
from hkvprof.models.attention import AttentionCall, MarkedLayer

Watch = Callable[[int, AttentionCall, Tensor], None]
"""Called after each layer's attention: covered layer number, the call, its output
[batch, rows, query_heads, dim]."""


class ObservedLayer(MarkedLayer):
    """A stock layer whose attention calls are shown to a watcher."""

    def __init__(self, number: int, watch: Watch) -> None:
        super().__init__()
        self.number = number
        self.watch = watch

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """The model's own attention, then a look at it.

        For gradients keys and values stay as the cache has them: what the model makes of these for
        every query head is made anew when its layer's turn comes.
        """
        if torch.is_grad_enabled():
            output, weights = checkpoint(call.dense, use_reentrant=False, preserve_rng_state=False)
        else:
            output, weights = call.dense()
        self.watch(self.number, call, output)
        return output, weights


class ObservedCache(DynamicCache):
    """A dense cache whose covered layers are watched."""

    layers: list[Any]

    def __init__(self, view: ModelView, watch: Watch) -> None:
        super().__init__(config=view.text_config)
        self.covered = [ObservedLayer(i, watch) for i in range(len(view.layer_ids))]
        replaced = dict(zip(view.layer_ids, self.covered, strict=True))
        count = max(len(self.layers), max(view.layer_ids) + 1)
        self.layers = [replaced.get(i) or self.layers[i] for i in range(count)]
        for layer in self.layers:
            for update in ("update_conv_state", "update_recurrent_state"):
                if hasattr(layer, update):
                    setattr(layer, update, partial(_anew, layer, getattr(layer, update)))


def _anew(layer: Any, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Update a linear layer's states in new tensors: gradients need those before the pass."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        if isinstance(states, Tensor):
            setattr(layer, name, states.clone())
        elif states is not None:
            setattr(layer, name, {i: s if s is None else s.clone() for i, s in states.items()})
    return update(*args, **kwargs)


@dataclass
class LayerTrace:
    """What one layer showed during a teacher-forced continuation of T tokens (batch of one).

    `query` [query_heads, T, dim] post-RoPE; `output` [T, query_heads, dim], whose `.grad` is the
    gradient of the replies' margins once `backward` has run; `scaling` of the logits.
    """

    query: Float[Tensor, "query_heads rows dim"]
    output: Float[Tensor, "1 rows query_heads dim"]
    scaling: float


@dataclass
class Observer:
    """Switches what is done with the attention calls of a pass."""

    window: int
    on_prefill: Watch | None = None
    window_query: dict[int, Float[Tensor, "query_heads window dim"]] = field(default_factory=dict)
    traces: dict[int, LayerTrace] = field(default_factory=dict)
    _phase: str = "off"

    def __call__(self, layer: int, call: AttentionCall, output: Tensor) -> None:
        """The watch function of ObservedCache."""
        if self._phase == "prefill":
            window = call.query[0, :, -self.window :].detach()
            self.window_query[layer] = window.to(torch.float32, copy=True)  # not all rows with it
            if self.on_prefill is not None:
                self.on_prefill(layer, call, output)
        elif self._phase == "trace":
            if torch.is_grad_enabled():
                if not output.requires_grad:
                    output.requires_grad_()
                output.retain_grad()
            self.traces[layer] = LayerTrace(call.query[0].detach().float(), output, call.scaling)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within: `prefill` keeps window queries, `trace` keeps queries and outputs of all rows."""
        self._phase = name
        try:
            yield
        finally:
            self._phase = "off"
