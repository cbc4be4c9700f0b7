"""What a call of `generate` asks for, read from its arguments."""

from __future__ import annotations

from typing import Any

from hkvprof.errors import ModelError
from hkvprof.models.forward import Call


def refuse_batching(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stands in for continuous batching. Raises ModelError."""
    raise ModelError(
        "continuous batching (generate_batch) brings a paged cache of its own, which hkvprof does "
        "not compress: use generate(), or detach first"
    )


def from_embeddings(call: Call) -> bool:
    """Whether `generate` starts from embeddings: then it uses a cache whatever the config says."""
    ids = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    return ids is None and call.get("inputs_embeds") is not None


def prompt_length(call: Call, config: Any) -> int | None:
    """Positions of the prompt that `generate` was given, where it is known beforehand.

    With a cache that holds some of them, tokens may be the new ones alone; the mask is of all.
    """
    if getattr(config, "token_healing", False):
        return None  # takes tokens off the prompt
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if (found := call.get(name)) is not None and found.ndim > 1:
            mask = call.get("attention_mask")
            whole = mask.shape[1] if mask is not None and mask.ndim == 2 else 0
            return max(int(found.shape[1]), int(whole))
    return None


def checkpoints(model: Any) -> bool:
    """Whether a part of the model computes its activations again (gradient checkpointing)."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
