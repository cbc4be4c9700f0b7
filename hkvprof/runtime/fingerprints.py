"""Is a profile for this model?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from hkvprof.errors import ProfileError
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.load import load_empty
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.record import Profile


def check_fingerprint(profile: Profile, view: ModelView) -> None:
    """Raise ProfileError naming the fields in which the profile's model differs; warn on others."""
    mine, theirs = profile.fingerprint, view.fingerprint
    mismatches = mine.mismatches(theirs)
    if mismatches:
        more = f" and {len(mismatches) - 4} more" if len(mismatches) > 4 else ""
        raise ProfileError(
            "this profile was made for another model (profile != model): "
            + "; ".join(mismatches[:4])
            + f"{more}. Calibrate this model with `hkvprof calibrate`"
        )
    remarks = mine.remarks(theirs)
    if remarks:
        warnings.warn(
            f"the profile was {'; '.join(remarks)}: head types may not carry over; calibrate this "
            "model to be sure",
            stacklevel=3,
        )
    elif mine.config_hash != theirs.config_hash:
        warnings.warn(
            "the model's config differs from the one calibrated in fields that do not change "
            "attention; compression works, its measured quality may not carry over",
            stacklevel=3,
        )


def without_weights(name_or_path: str | Path, profile: Profile) -> tuple[Any, ChatProcessor]:
    """The model as `load_empty` gives it, and its processor, where the profile is of this model.

    Raises ProfileError where it is not, ModelError. What `apply` only warns of is left to it.
    """
    empty, processor = load_empty(name_or_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_fingerprint(profile, view_model(empty))
    return empty, processor
