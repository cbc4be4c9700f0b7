"""What a model will need, from its config alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hkvprof.errors import UsageError
from hkvprof.heads import HeadGrid
from hkvprof.models.adapter import view_model
from hkvprof.models.load import DTYPES
from hkvprof.models.quantised import bits_per_weight, is_converted
from hkvprof.profile.sizes import ModelSizes


def context_limit(model: Any) -> int | None:
    """The longest context in tokens that the model was made for; None where the config is mute."""
    text_config = model.config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    return max(int(limit), _stretched(text_config, int(limit))) if limit else None


def _stretched(text_config: Any, limit: int) -> int:
    """How far rotary embeddings are scaled, whichever of the two the config gives as its limit."""
    found = getattr(text_config, "rope_parameters", None) or {}
    factor, original = found.get("factor"), found.get("original_max_position_embeddings")
    return round(float(factor) * int(original or limit)) if factor else limit


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


@dataclass(frozen=True)
class Outline:
    """A model's sizes: `weight_bytes` in the dtype asked for, `itemsize` of K/V elements, `layers`
    of the decoder (those that hkvprof does not cover included), widths of its hidden states and of
    its feed-forward layers (of all experts that one token uses), and its vocabulary."""

    grid: HeadGrid
    weight_bytes: int
    itemsize: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def outline(model: Any, dtype: str = "auto") -> Outline:
    """Sizes of a model, which may be empty (`load_empty`), loaded in `dtype`.

    Raises ModelError for unsupported models, UsageError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    text = model.config.get_text_config(decoder=True)
    stored = getattr(model.config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    kind: Any = stored if dtype == "auto" else DTYPES[dtype]
    itemsize = torch.empty(0, dtype=kind).element_size()
    return Outline(
        grid=view_model(model).grid,
        weight_bytes=_weight_bytes(model, itemsize),
        itemsize=itemsize,
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=_intermediate(text),
        vocabulary=int(text.vocab_size),
    )


def sizes_of(model: Any) -> ModelSizes:
    """What a profile tells on of a model that is loaded, wherever its weights lie.

    Numbers of 16 or 32 bits count as either; what is packed in fewer, as it lies.
    """
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    elements = sum(t.numel() for t in held if _is_plain(t))
    packed = sum(t.numel() * t.element_size() for t in held if not _is_plain(t))
    return ModelSizes(2 * elements + packed, 4 * elements + packed, context_limit(model))


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def _weight_bytes(model: Any, itemsize: int) -> int:
    """Bytes of all weights, linear layers as packed as the checkpoint's config says; the head is
    never packed."""
    head = model.get_output_embeddings()
    sizes: dict[int, float] = {}
    for name, module in model.named_modules():
        packed = isinstance(module, nn.Linear) and module is not head
        packed = packed and is_converted(model.config, name)
        bits = bits_per_weight(model.config, 8 * itemsize) if packed else 8 * itemsize
        for key, parameter in module.named_parameters(recurse=False):
            each = bits if key == "weight" else 8 * itemsize
            sizes.setdefault(id(parameter), parameter.numel() * each / 8)  # tied ones count once
    return round(sum(sizes.values()))


def _intermediate(text: Any) -> int:
    dense = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    experts = int(getattr(text, "num_experts_per_tok", None) or 0)
    each = int(getattr(text, "moe_intermediate_size", None) or dense)
    return max(dense, experts * each)
