"""Offline profiles of attention heads for KV-cache compression in multimodal LLMs.

The names below are loaded when first used, so that `import hkvprof` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hkvprof.artifact import Profile, load_profile
    from hkvprof.models.load import load_model
    from hkvprof.profile.calibrate import calibrate
    from hkvprof.profile.uniform import uniform_profile

__version__ = "0.1.0"
__all__ = ["Profile", "__version__", "calibrate", "load_model", "load_profile", "uniform_profile"]

_HOMES = {
    "Profile": "hkvprof.artifact",
    "load_profile": "hkvprof.artifact",
    "load_model": "hkvprof.models.load",
    "calibrate": "hkvprof.profile.calibrate",
    "uniform_profile": "hkvprof.profile.uniform",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
