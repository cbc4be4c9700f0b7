"""What hkvprof needs to know of a model, read once from its config and modules.

Nothing outside hkvprof.models reads a Hugging Face config.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkvprof.errors import ModelError
from hkvprof.heads import HeadGrid, ModelFingerprint
from hkvprof.models.weights import whole_weight

_VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id")
_VISION_GEOMETRY = ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size")
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")
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


@dataclass(frozen=True)
class ModelView:
    """A decoder as hkvprof sees it: its geometry and the attention modules that are covered.

    `attention[i]` is the attention module of covered layer i, `layer_ids[i]` its number in the
    model's cache. Sliding-window and linear layers are not covered: they stay as they are.
    """

    fingerprint: ModelFingerprint
    layer_ids: tuple[int, ...]
    attention: tuple[nn.Module, ...]
    text_config: Any

    @property
    def grid(self) -> HeadGrid:
        """Geometry of the covered layers."""
        return self.fingerprint.grid


def view_model(model: Any) -> ModelView:
    """Translate a transformers model. Raises ModelError, with the reason, for unsupported ones."""
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ModelError(
            f"expected a transformers generation model, found {type(model).__name__}: load it with "
            "hkvprof.load_model or AutoModel...from_pretrained"
        )
    _refuse_unsupported(model.config)
    text_config = model.config.get_text_config(decoder=True)
    modules = _attention_modules(model)
    _refuse_modules(model, modules)
    layer_ids = _full_attention_layers(text_config)
    missing = [index for index in layer_ids if index not in modules]
    if not layer_ids or missing:
        raise ModelError(
            f"{type(model).__name__} has no supported layer"
            + (f" {missing[0]}: no attention module with that layer_idx" if missing else "")
            + ": expected decoder layers with full attention through transformers' "
            "AttentionInterface"
        )
    attention = tuple(modules[index] for index in layer_ids)
    grid = _head_grid(text_config, attention)
    return ModelView(_fingerprint(model, grid, attention), tuple(layer_ids), attention, text_config)


def output_projection(attention: nn.Module) -> Tensor:
    """W_O of an attention module, [hidden, query_heads * head_dim]."""
    name = _output_name(attention)
    if name is None:
        raise ModelError(
            f"{type(attention).__name__} has no output projection named "
            f"{', '.join(_OUTPUT_PROJECTIONS)}: this architecture needs an adapter"
        )
    return whole_weight(getattr(attention, name))


def _refuse_unsupported(config: Any) -> None:
    text = config.get_text_config(decoder=True)
    spread = getattr(config, "distributed_config", None)
    reasons = {
        "tensor parallelism": (getattr(spread, "tp_size", None) or 1) > 1,
        "pipeline parallelism": (getattr(spread, "pp_size", None) or 1) > 1,
        "an encoder and a decoder": getattr(config, "is_encoder_decoder", False),
        "attention logit soft-capping": getattr(text, "attn_logit_softcapping", None),
        "learned attention sinks": getattr(text, "model_type", "") == "gpt_oss",
        "multi-head latent attention": getattr(text, "kv_lora_rank", None),
        "layers that share one layer's keys and values": getattr(
            text, "num_kv_shared_layers", None
        ),
    }
    for reason, present in reasons.items():
        if present:
            raise _unsupported(getattr(config, "model_type", "this model"), reason)


def _refuse_modules(model: Any, modules: dict[int, nn.Module]) -> None:
    if any(getattr(module, "sinks", None) is not None for module in modules.values()):
        raise _unsupported(model.config.model_type, "learned attention sinks")


def _unsupported(name: str, reason: str) -> ModelError:
    return ModelError(
        f"{name} is not supported: it uses {reason}, which the compressed attention would compute "
        "wrongly; `hkvprof models` lists models that work"
    )


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules of the decoder by layer number."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and _output_name(module) and _head_dim(module):
            found.setdefault(index, module)
    return found


def _output_name(attention: nn.Module) -> str | None:
    return next(
        (name for name in _OUTPUT_PROJECTIONS if hasattr(getattr(attention, name, None), "weight")),
        None,
    )


def _head_dim(attention: nn.Module) -> int:
    return int(getattr(attention, "head_dim", None) or getattr(attention, "head_size", None) or 0)


def _full_attention_layers(text_config: Any) -> list[int]:
    """Layers that transformers would give a plain growing cache."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=text_config).layers
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _head_grid(text_config: Any, attention: tuple[nn.Module, ...]) -> HeadGrid:
    head_dims = {_head_dim(module) for module in attention}
    groups = {int(getattr(module, "num_key_value_groups", 1)) for module in attention}
    if len(head_dims) != 1 or len(groups) != 1:
        raise ModelError(
            f"layers with different head widths ({sorted(head_dims)}) or group sizes "
            f"({sorted(groups)}) are not supported: expected one of each"
        )
    kv_heads = int(
        getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    )
    return HeadGrid(
        layers=len(attention),
        query_heads=kv_heads * groups.pop(),
        kv_heads=kv_heads,
        head_dim=head_dims.pop(),
    )


def _fingerprint(model: Any, grid: HeadGrid, attention: tuple[nn.Module, ...]) -> ModelFingerprint:
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
        weights_digest=_weights_digest(attention),
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


def _weights_digest(attention: tuple[nn.Module, ...]) -> str:
    """Digest of weights sampled from the query, key and value projections (or the fused one) of
    every layer, equal whether a checkpoint is loaded in float32, bfloat16 or float16, and wherever
    its weights lie.

    Empty for a model without weights (meta device).
    """
    digest = hashlib.sha256()
    for module in attention:
        output = f"{_output_name(module)}."
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
