"""HybridKV with the types of a profile: what deciding them offline costs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hkvprof.calibration.decide import classify_by_sparsity
from hkvprof.errors import UsageError
from hkvprof.evaluate.baselines.base import Prompt, Selection, baseline
from hkvprof.evaluate.baselines.hybridkv import KAPPA, KEEP, THETA, by_types
from hkvprof.profile.record import Profile


@baseline(
    "hybridkv_offline", "HybridKV, types from the profile", "hkvprof", keep=KEEP,
    needs_profile=True, public=False,
)  # fmt: skip
def hybridkv_offline(prompt: Prompt) -> Selection:
    """As `hybridkv`, but types and shares come from the calibration's mean sparsity."""
    profile = prompt.need_profile("hybridkv_offline")
    return by_types(prompt, offline_types(profile), offline_sparsity(profile))


def offline_sparsity(profile: Profile) -> NDArray[np.float32]:
    """Mean sparsity over the calibration's samples at HybridKV's kappa, [layers, query_heads].

    Raises UsageError for a profile without it.
    """
    return profile.sparsity_mean[_kappa(profile)]


def offline_types(profile: Profile) -> NDArray[np.uint8]:
    """What the recipe `paper` decides at that kappa, [layers, kv_heads]. Raises UsageError."""
    at, samples = _kappa(profile), profile.provenance.get("samples", 0)
    mean, std = profile.sparsity_mean[at], profile.sparsity_std[at]
    return classify_by_sparsity(mean, std, samples, THETA, profile.grid)


def _kappa(profile: Profile) -> int:
    if KAPPA not in profile.kappas or not profile.provenance.get("samples"):
        raise UsageError(
            f"hybridkv_offline needs a calibrated profile with sparsity at kappa {KAPPA:g}, found "
            f"kappas {profile.kappas}: calibrate this model"
        )
    return profile.kappas.index(KAPPA)
