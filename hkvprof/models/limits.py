"""What a model's config says about its limits."""

from __future__ import annotations

from typing import Any


def context_limit(model: Any) -> int | None:
    """The longest context in tokens that the model was made for; None where the config is mute."""
    text_config = model.config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    return int(limit) if limit else None


def vocabulary(model: Any) -> int:
    """Number of token ids."""
    return int(model.config.get_text_config(decoder=True).vocab_size)
