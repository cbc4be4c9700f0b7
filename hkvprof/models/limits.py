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


def special_tokens(model: Any) -> set[int]:
    """Ids that the config gives a meaning: begin, end, padding."""
    text_config = model.config.get_text_config(decoder=True)
    special: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(text_config, name, None)
        special |= set(found if isinstance(found, list) else () if found is None else (found,))
    return special


def pad_token(model: Any) -> int:
    """The id that fills up short rows; 0 where the config names none (it is masked anyway)."""
    found = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    return 0 if found is None else int(found)
