"""Adapters of weights (peft's LoRA and its like) inside a model: which ones run, and what they are.

Known by what their layers offer (`base_layer`, `active_adapters`, `merged_adapters`), so that peft
is not needed; models that transformers itself gave adapters (`load_adapter`) have the same layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

MERGED = " (merged)"
"""What a fingerprint puts behind the name of an adapter whose weights are in the base layers."""


def is_tuner(module: nn.Module) -> bool:
    """Whether `module` wraps a layer and adds adapters to it."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(
        module, "active_adapters"
    )


def base_layer(layer: nn.Module) -> Any:
    """The layer inside of all adapters."""
    while is_tuner(layer):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


def runs_adapters(layer: nn.Module) -> bool:
    """Whether a layer adds something to its base layer when it runs."""
    return is_tuner(layer) and (bool(_running(layer)) or runs_adapters(layer.base_layer))  # type: ignore[arg-type]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Adapters that shape the model's answers, sorted: `name` where the layers add them as they
    run, `name (merged)` where they are in the base layers' weights."""
    found: set[str] = set()
    for layer in _tuners(model):
        found.update(_running(layer))
        found.update(f"{name}{MERGED}" for name in getattr(layer, "merged_adapters", ()))
    return tuple(sorted(found))


def running_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and name of every parameter of the adapters that run unmerged."""
    for layer in _tuners(model):
        names = _running(layer)
        for name, _ in layer.named_parameters():
            parts = name.split(".")
            if parts[0] != "base_layer" and names & {*parts}:
                yield layer.get_submodule(".".join(parts[:-1])), parts[-1]


def refusal(model: nn.Module) -> str:
    """Why a model with adapters cannot be compressed; empty if nothing speaks against it."""
    for module in model.modules():
        if type(module).__name__.startswith("AdaptedAttention"):
            return "it uses adaption prompts (peft), which attend beside the cache"
    return ""


def _tuners(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if is_tuner(module))


def _running(layer: Any) -> set[str]:
    """Names of the adapters that a tuner layer adds as it runs; peft runs merged layers as base
    layers, and switched off ones too."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged_adapters", ()):
        return set()
    held = {
        name
        for attribute in getattr(layer, "adapter_layer_names", ())
        for name in getattr(layer, attribute, ())
    }
    active = layer.active_adapters
    return {active} & held if isinstance(active, str) else {*active} & held
