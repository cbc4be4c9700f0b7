"""Offline profiles of attention heads for KV-cache compression in multimodal LLMs.

The names below are loaded when first used, so that `import hkvprof` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hkvprof.lazy import lazy_names

if TYPE_CHECKING:
    from hkvprof.calibration.calibrate import calibrate
    from hkvprof.calibration.recipe import Recipe
    from hkvprof.calibration.uniform import uniform_profile
    from hkvprof.models.load import load_model
    from hkvprof.profile.record import Profile, load_profile

__version__ = "0.1.0"
__all__ = [
    "Profile",
    "Recipe",
    "__version__",
    "calibrate",
    "load_model",
    "load_profile",
    "uniform_profile",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Profile": "hkvprof.profile.record",
        "load_profile": "hkvprof.profile.record",
        "load_model": "hkvprof.models.load",
        "calibrate": "hkvprof.calibration.calibrate",
        "Recipe": "hkvprof.calibration.recipe",
        "uniform_profile": "hkvprof.calibration.uniform",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
