"""The transformers model inside of whatever wraps it."""

from __future__ import annotations

from typing import Any

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
