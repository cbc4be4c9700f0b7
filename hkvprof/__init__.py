"""Offline profiles of attention heads for KV-cache compression in multimodal LLMs.

    profile = hkvprof.load_profile("model.hkv.safetensors")
    with hkvprof.apply(model, profile, budget=0.10):
        model.generate(...)

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
    from hkvprof.profile.budgets import Budget, Fetch
    from hkvprof.profile.record import Profile, load_profile
    from hkvprof.runtime.handle import Handle, apply
    from hkvprof.runtime.options import Options
    from hkvprof.runtime.receipt import Receipt
    from hkvprof.samples.read import load_samples, open_images

__version__ = "0.1.0"
__all__ = [
    "Budget", "Fetch", "Handle", "Options", "Profile", "Receipt", "Recipe", "__version__", "apply",
    "calibrate", "load_model", "load_profile", "load_samples", "open_images",
    "uniform_profile",
]  # fmt: skip

__getattr__ = lazy_names(
    __name__,
    {
        "Budget": "hkvprof.profile.budgets",
        "Fetch": "hkvprof.profile.budgets",
        "Handle": "hkvprof.runtime.handle",
        "Options": "hkvprof.runtime.options",
        "Profile": "hkvprof.profile.record",
        "Receipt": "hkvprof.runtime.receipt",
        "Recipe": "hkvprof.calibration.recipe",
        "apply": "hkvprof.runtime.handle",
        "calibrate": "hkvprof.calibration.calibrate",
        "load_model": "hkvprof.models.load",
        "load_profile": "hkvprof.profile.record",
        "load_samples": "hkvprof.samples.read",
        "open_images": "hkvprof.samples.read",
        "uniform_profile": "hkvprof.calibration.uniform",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
