"""Options of a model's forward pass that not every architecture has."""

from __future__ import annotations

import inspect
from typing import Any


def rope_holder(model: Any) -> Any:
    """The module on which Qwen-VL models keep a conversation's M-RoPE offset (`rope_deltas`);
    None for other models."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "rope_deltas") else None


def last_row_only(model: Any) -> dict[str, Any]:
    """Arguments that make a forward pass compute logits of the last row alone, where supported.

    At 3,000 tokens and a vocabulary of 49,152 the other rows are 590 MB of float32 for nothing.
    """
    supported = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if supported else {}
