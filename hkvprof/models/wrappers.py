"""What wraps a model, and what wraps its layers.

Around the model: compiled, adapted or distributed wrappers and pipelines. Around its layers:
adapters of weights (peft's LoRA and its like), which ones run, and what they are. Both are known
by the names of their classes and by what they offer (`base_layer`, `active_adapters`,
`merged_adapters`), so that none of their packages is needed; models that transformers itself gave
adapters (`load_adapter`) have the same layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hkvprof.errors import ModelError

_DEEPEST = 16
"""Wrappers around wrappers; more are a cycle."""
_INNER = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # peft's LoraModel and its like
    "Pipeline": "model",
}
_REFUSED = {
    "DataParallel": "torch.nn.DataParallel copies the model for every call, hooks included: use "
    "one process per device",
}


def unwrap(model: Any) -> Any:
    """The transformers model inside of compiled, adapted or distributed wrappers and pipelines.

    A model without a wrapper is returned as it is. Wrappers are known by the names of their
    classes, so that none of their packages is needed. Raises ModelError for wrappers under which
    compression would be wrong: DataParallel, and peft's prompt learning, which fills caches itself.
    """
    for _ in range(_DEEPEST):
        name = _inner_name(model)
        if name is None:
            return model
        _refuse_prompt_learning(model)
        model = getattr(model, name)
    raise ModelError(f"{type(model).__name__}: more than {_DEEPEST} wrappers around a model")


def _inner_name(model: Any) -> str | None:
    """The attribute under which a wrapper keeps what it wraps; None for anything else."""
    if hasattr(type(model), "generate") and hasattr(model, "config") and not _foreign(model):
        return None
    for kind in type(model).__mro__:
        if kind.__name__ in _REFUSED:
            raise ModelError(f"{kind.__name__} is not supported: {_REFUSED[kind.__name__]}")
        if kind.__name__ in _INNER and hasattr(model, _INNER[kind.__name__]):
            return _INNER[kind.__name__]
    return None


def _foreign(model: Any) -> bool:
    """Whether a class of another package offers `generate` around a model (peft's does)."""
    return any(kind.__name__ in _INNER for kind in type(model).__mro__)


def _refuse_prompt_learning(model: Any) -> None:
    """peft's prefix tuning fills a cache before the prompt, prompt tuning lengthens the prompt."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    learned = [n for n, c in configs.items() if getattr(c, "is_prompt_learning", False)]
    if learned:
        raise ModelError(
            f"the adapter {learned[0]!r} is prompt learning (peft), which puts virtual tokens "
            "before the prompt and is not supported: use LoRA or another adapter of weights"
        )


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
