"""Who a model is: geometry, positions, vision tokens, and a digest of its weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkvprof.heads import HeadGrid, ModelFingerprint
from hkvprof.models.architectures.base import Adapter
from hkvprof.models.weights import whole_weight

_VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id")
_VISION_GEOMETRY = ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size")
_HASHED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
    "hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps", "attention_bias",
    "sliding_window", "max_position_embeddings", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size",
)  # fmt: skip
_HASHED_VISION = (
    "model_type", "hidden_size", "intermediate_size", "hidden_act", "out_hidden_size",
    "window_size", "fullatt_block_indexes",
)  # fmt: skip
"""Config fields behind `config_hash`: fixed lists, because releases of transformers add fields."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SCATTER = 2654435761
"""2^32 over the golden ratio: its multiples spread evenly over any range."""
_TINY = 2.0**-14
"""Smallest normal float16: below it a float16 copy of a weight may round differently."""


def fingerprint_of(
    model: Any, adapter: Adapter, grid: HeadGrid, attention: tuple[nn.Module, ...]
) -> ModelFingerprint:
    """The identity of a model whose covered layers have these attention modules."""
    config, text = model.config, model.config.get_text_config(decoder=True)
    vision: dict[str, Any] = {k: getattr(config, k) for k in _VISION_TOKENS if _known(config, k)}
    if (tower := getattr(config, "vision_config", None)) is not None:
        vision |= {k: getattr(tower, k) for k in _VISION_GEOMETRY if _known(tower, k)}
    hub_id, commit = _origin(model)
    return ModelFingerprint(
        architecture=_architecture(model),
        grid=grid,
        rope=_rope(getattr(text, "rope_parameters", None) or {}),
        vision=vision,
        config_hash=_config_hash(text, tower),
        weights_digest=_weights_digest(adapter, attention),
        hub_id=hub_id,
        commit=commit,
    )


def _architecture(model: Any) -> str:
    """Name of the model's class; FSDP puts a class of its own before it."""
    return next(c.__name__ for c in type(model).__mro__ if not c.__module__.startswith("torch."))


def _known(config: Any, key: str) -> bool:
    return isinstance(getattr(config, key, None), (int, str, list))


def _rope(parameters: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """RoPE parameters without nesting: models with sliding layers have one set per layer type."""
    flat: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            flat |= _rope(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, str, list)):
            flat[f"{prefix}{key}"] = value
    return flat


def _origin(model: Any) -> tuple[str, str]:
    """Hub id and commit; both empty for folders, whose names are nobody else's business."""
    name = str(getattr(model, "name_or_path", "") or "")
    commit = str(getattr(model.config, "_commit_hash", None) or "")
    if not commit or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return "", ""
    return name, commit


def _config_hash(text: Any, tower: Any) -> str:
    parts = [
        {key: getattr(config, key) for key in keys if getattr(config, key, None) is not None}
        for config, keys in ((text, _HASHED), (tower, _HASHED_VISION))
    ]
    canonical = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _weights_digest(adapter: Adapter, attention: tuple[nn.Module, ...]) -> str:
    """Digest of weights sampled from the query, key and value projections (or the fused one) of
    every layer, equal whether a checkpoint is loaded in float32, bfloat16 or float16, and wherever
    its weights lie.

    Empty for a model without weights (meta device).
    """
    digest = hashlib.sha256()
    for module in attention:
        output = f"{adapter.output_name(module)}."
        for name, parameter in module.named_parameters():
            if parameter.ndim != 2 or name.startswith(output):
                continue
            owner, _, key = name.rpartition(".")
            weight = whole_weight(module.get_submodule(owner), key)
            if weight.device.type == "meta":
                return ""
            digest.update(_sampled(weight))
    return digest.hexdigest()[:16]


def _sampled(weight: Tensor, count: int = 64) -> bytes:
    """`count` scattered elements of a matrix, rounded to bfloat16, tiny ones to zero."""
    columns = weight.shape[1]
    places = torch.arange(count) * _SCATTER % weight.numel()
    places = places.to(weight.device)
    picked = weight.detach()[places // columns, places % columns].to(torch.bfloat16).float()
    picked = torch.where(picked.abs() < _TINY, 0.0, picked)
    return bytes(picked.cpu().numpy().tobytes())
