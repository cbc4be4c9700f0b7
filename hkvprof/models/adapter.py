"""What hkvprof needs to know of a model, read once from its config and modules.

Nothing outside hkvprof.models reads a Hugging Face config.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hkvprof.errors import ModelError
from hkvprof.heads import HeadGrid, ModelFingerprint

_VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id")
_VISION_GEOMETRY = ("patch_size", "spatial_merge_size", "temporal_patch_size", "image_size")
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures")


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
    """Translate a transformers model. Raises ModelError, naming the reason, for unsupported ones."""
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ModelError(
            f"expected a transformers generation model, found {type(model).__name__}: load it with "
            "hkvprof.load_model or AutoModel...from_pretrained"
        )
    _refuse_unsupported(model.config)
    text_config = model.config.get_text_config(decoder=True)
    modules = _attention_modules(model)
    layer_ids = _full_attention_layers(text_config)
    missing = [index for index in layer_ids if index not in modules]
    if not layer_ids or missing:
        raise ModelError(
            f"{type(model).__name__} has no supported layer"
            + (f" {missing[0]}: no attention module with that layer_idx" if missing else "")
            + ": expected decoder layers with full attention through transformers' AttentionInterface"
        )
    attention = tuple(modules[index] for index in layer_ids)
    grid = _head_grid(text_config, attention)
    return ModelView(_fingerprint(model, grid, attention), tuple(layer_ids), attention, text_config)


def output_projection(attention: nn.Module) -> Tensor:
    """W_O of an attention module, [hidden, query_heads * head_dim]."""
    for name in ("o_proj", "out_proj", "dense"):
        projection = getattr(attention, name, None)
        if projection is not None:
            return projection.weight
    raise ModelError(
        f"{type(attention).__name__} has no output projection named o_proj, out_proj or dense: "
        "this architecture needs an adapter"
    )


def _refuse_unsupported(config: Any) -> None:
    text = config.get_text_config(decoder=True)
    name = getattr(config, "model_type", "this model")
    reasons = {
        "an encoder and a decoder": getattr(config, "is_encoder_decoder", False),
        "attention logit soft-capping": getattr(text, "attn_logit_softcapping", None),
        "learned attention sinks": getattr(text, "model_type", "") == "gpt_oss",
        "multi-head latent attention": getattr(text, "kv_lora_rank", None),
    }
    for reason, present in reasons.items():
        if present:
            raise ModelError(
                f"{name} is not supported: it uses {reason}, which the compressed attention would "
                "compute wrongly"
            )


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules of the decoder by layer number."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "num_key_value_groups"):
            found.setdefault(index, module)
    return found


def _full_attention_layers(text_config: Any) -> list[int]:
    """Layers that transformers would give a plain growing cache."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=text_config).layers
    if not layers:
        return list(range(text_config.num_hidden_layers))
    return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]


def _head_grid(text_config: Any, attention: tuple[nn.Module, ...]) -> HeadGrid:
    head_dims = {int(getattr(module, "head_dim", 0)) for module in attention}
    groups = {int(module.num_key_value_groups) for module in attention}  # type: ignore[arg-type]
    if len(head_dims) != 1 or len(groups) != 1:
        raise ModelError("layers with different head widths or group sizes are not supported")
    kv_heads = int(getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads)
    return HeadGrid(
        layers=len(attention),
        query_heads=kv_heads * groups.pop(),
        kv_heads=kv_heads,
        head_dim=head_dims.pop(),
    )


def _fingerprint(
    model: Any, grid: HeadGrid, attention: tuple[nn.Module, ...]
) -> ModelFingerprint:
    config, text = model.config, model.config.get_text_config(decoder=True)
    rope = dict(getattr(text, "rope_parameters", None) or {})
    rope = {k: v for k, v in rope.items() if isinstance(v, (int, float, str, list))}
    vision: dict[str, Any] = {k: getattr(config, k) for k in _VISION_TOKENS if _known(config, k)}
    if (tower := getattr(config, "vision_config", None)) is not None:
        vision |= {k: getattr(tower, k) for k in _VISION_GEOMETRY if _known(tower, k)}
    return ModelFingerprint(
        architecture=type(model).__name__,
        grid=grid,
        rope=rope,
        vision=vision,
        config_hash=_config_hash(config),
        weights_digest=_weights_digest(attention),
        hub_id=_hub_id(model),
        commit=str(getattr(config, "_commit_hash", None) or ""),
    )


def _known(config: Any, key: str) -> bool:
    return isinstance(getattr(config, key, None), (int, str, list))


def _hub_id(model: Any) -> str:
    """The hub id a model came from; folders of this machine are nobody else's business."""
    name = str(getattr(model, "name_or_path", "") or "")
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else ""


def _config_hash(config: Any) -> str:
    text = json.dumps(_stable(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(k): _stable(v)
            for k, v in value.items()
            if k not in _VOLATILE and "attn_implementation" not in str(k)
        }
    return [_stable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _weights_digest(attention: tuple[nn.Module, ...], samples: int = 64) -> str:
    """Digest of a few weights of every first parameter matrix per layer, rounded to bfloat16."""
    digest = hashlib.sha256()
    for module in attention:
        weight = next(p for p in module.parameters() if p.ndim == 2)
        if weight.device.type == "meta":
            return ""
        step = max(1, weight.numel() // samples)
        picked = weight.detach().reshape(-1)[::step][:samples].to(torch.bfloat16)
        digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
