"""Which adapter an architecture gets."""

from __future__ import annotations

from typing import Any

from hkvprof.errors import UsageError
from hkvprof.models.architectures.base import Adapter
from hkvprof.models.architectures.families import FAMILIES

_GENERIC = Adapter()
_ADAPTERS: dict[str, Adapter] = {
    model_type: adapter for adapter in FAMILIES for model_type in adapter.model_types
}


def register_adapter(adapter: Adapter, *, replace: bool = False) -> None:
    """Use `adapter` for models whose `config.model_type` is among its `model_types`.

    For the running process. Raises UsageError if it names no type, or one that has an adapter
    already and `replace` is False.
    """
    if not isinstance(adapter, Adapter) or not adapter.model_types:
        raise UsageError(
            "expected an instance of a subclass of hkvprof.models.Adapter that names its "
            f"model_types, found {adapter!r}"
        )
    known = [name for name in adapter.model_types if name in _ADAPTERS]
    if known and not replace:
        raise UsageError(
            f"{', '.join(known)} has an adapter already: pass replace=True to use yours instead"
        )
    _ADAPTERS.update(dict.fromkeys(adapter.model_types, adapter))


def adapter_for(config: Any) -> Adapter:
    """The adapter registered for a model's config, else the generic one."""
    return _ADAPTERS.get(getattr(config, "model_type", ""), _GENERIC)


def is_registered(config: Any) -> bool:
    """False for an architecture that no adapter names: it is tried with the generic one."""
    return getattr(config, "model_type", "") in _ADAPTERS
