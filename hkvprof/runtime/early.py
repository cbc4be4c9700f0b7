"""What of a profile can be refused before weights are loaded: the model's config tells."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from hkvprof.artifact import Profile
from hkvprof.models.adapter import view_model
from hkvprof.models.load import load_empty
from hkvprof.models.processing import ChatProcessor
from hkvprof.runtime.fingerprints import check_fingerprint


def without_weights(name_or_path: str | Path, profile: Profile) -> tuple[Any, ChatProcessor]:
    """The model as `load_empty` gives it, and its processor, where the profile is of this model.

    Raises ProfileError where it is not, ModelError. What `apply` only warns of is left to it.
    """
    empty, processor = load_empty(name_or_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_fingerprint(profile, view_model(empty))
    return empty, processor
