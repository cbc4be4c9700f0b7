"""Further passes of the model that a method asks for, with its attention calls in view."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hkvprof.models.adapter import ModelView
from hkvprof.models.attention import hooked_attention
from hkvprof.models.forward import rope_holder
from hkvprof.profile.observe import ObservedCache, Watch


@contextmanager
def watched(model: Any, view: ModelView, watch: Watch) -> Iterator[ObservedCache]:
    """Within: a cache whose layers show their attention calls. Gradients are off.

    Qwen-VL's position offset of the current conversation, which is on the model, is put back.
    """
    holder = rope_holder(model)
    deltas = getattr(holder, "rope_deltas", None)
    try:
        with torch.no_grad(), hooked_attention(model):
            yield ObservedCache(view, watch)
    finally:
        if holder is not None:
            holder.rope_deltas = deltas
