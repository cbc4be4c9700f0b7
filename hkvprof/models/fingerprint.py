"""Who a model is: geometry, positions, vision tokens, and a digest of its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkvprof.heads import MOST_ADAPTERS, HeadGrid, ModelFingerprint
from hkvprof.models.architectures import Adapter
from hkvprof.models.quantised import quantisation_of
from hkvprof.models.weights import columns_of, is_opaque, whole_weight
from hkvprof.models.wrappers import adapter_names, is_tuner, running_weights

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
    layers = tuple(attention_layers(adapter, attention))
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
        weights_digest=_weights_digest(model, layers),
        hub_id=hub_id,
        commit=commit,
        quantisation=quantisation_of(model, layers),
        adapters=adapter_names(model)[:MOST_ADAPTERS],
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


def _weights_digest(model: Any, layers: tuple[nn.Module, ...]) -> str:
    """Digest of weights sampled from the query, key and value projections (or the fused one) of
    every layer, equal whether a checkpoint is loaded in float32, bfloat16 or float16, and wherever
    its weights lie; and of the adapters that run on them.

    Of quantised weights it is that of the dequantised ones. Empty for a model without weights (meta
    device).
    """
    digest = hashlib.sha256()
    for layer in layers:
        opaque = is_opaque(layer)
        if opaque and _is_missing(layer):
            return ""
        if opaque:
            digest.update(_asked(layer))
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.ndim != 2 or (name != "weight" and hasattr(layer, "in_features")):
                continue  # quantised layers keep their scales beside the weight they unpacked
            weight = whole_weight(layer, name)
            if weight.device.type == "meta":
                return ""
            digest.update(_sampled(weight))
    for owner, name in running_weights(model):
        weight = whole_weight(owner, name)
        if weight.device.type == "meta":
            return ""
        digest.update(_sampled(weight.reshape(-1, weight.shape[-1] if weight.ndim else 1)))
    return digest.hexdigest()[:16]


def attention_layers(adapter: Adapter, attention: tuple[nn.Module, ...]) -> Iterator[nn.Module]:
    """Attention modules and what is in them but for the output projection, adapters left out."""
    for module in attention:
        yield module
        output = adapter.output_name(module)
        for name, child in module.named_children():
            if name != output:
                yield from _bare(child)


def _bare(module: nn.Module) -> Iterator[nn.Module]:
    if is_tuner(module):
        yield from _bare(module.base_layer)  # type: ignore[arg-type]
        return
    yield module
    for child in module.children():
        yield from _bare(child)


def _is_missing(layer: nn.Module) -> bool:
    """Whether a packed layer has no weights: accelerate's hook brings those that are offloaded."""
    held = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return any(t.device.type == "meta" for t in held) and not hasattr(layer, "_hf_hook")


def _places(elements: int, count: int = 64) -> Tensor:
    """`count` scattered numbers below `elements`."""
    return torch.arange(count) * _SCATTER % elements


def _sampled(weight: Tensor) -> bytes:
    """Scattered elements of a matrix."""
    columns = weight.shape[1]
    places = _places(weight.numel()).to(weight.device)
    return _rounded(weight.detach()[places // columns, places % columns])


def _asked(layer: Any) -> bytes:
    """The same elements of a matrix that only its layer can read."""
    columns = int(layer.in_features)
    places = _places(columns * int(layer.out_features))
    answers = columns_of(layer, places % columns)
    rows = (places // columns).to(answers.device)
    return _rounded(answers.gather(1, rows[:, None])[:, 0])


def _rounded(picked: Tensor) -> bytes:
    """Elements rounded to bfloat16, tiny ones to zero."""
    picked = picked.to(torch.bfloat16).float()
    picked = torch.where(picked.abs() < _TINY, 0.0, picked)
    return bytes(picked.cpu().numpy().tobytes())
