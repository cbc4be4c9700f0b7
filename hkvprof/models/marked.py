"""A stock cache layer whose attention calls come back to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hkvprof.models.attention import mark


class MarkedLayer(DynamicLayer):
    """Stores as the stock layer does and marks its keys; subclasses say what `attend` does."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store as usual and mark the keys."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return mark(keys, self), values
