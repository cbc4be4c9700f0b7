"""Whether samples are held out: a certificate on calibration samples would say nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from hkvprof.calibration.probe import content_digest
from hkvprof.errors import UsageError
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.record import Profile
from hkvprof.samples.read import Sample, open_images, samples_digest
from hkvprof.samples.record import SAMPLES_KEY, short_digest

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
_NAMED = 3


def check_source(profile: Profile, data: str, samples: Sequence[Sample]) -> None:
    """Raise UsageError where these are the very samples that the profile was calibrated on, or may
    be some of them and nothing in the profile tells."""
    origin = profile.provenance
    if origin.get("data_digest") == samples_digest(samples):
        raise UsageError(
            f"the profile was calibrated on these very samples ({data}): give held-out ones, which "
            "calibration has not seen"
        )
    if SAMPLES_KEY not in origin and origin.get("data") == data:
        raise UsageError(
            f"the profile was calibrated on samples of {data} and does not record on which: give "
            "other data, or calibrate again with this version"
        )


def check_contents(
    profile: Profile, processor: ChatProcessor, samples: Sequence[Sample], track: Track
) -> bool:
    """Compare every sample with those of the calibration, by tokens, pixels and replies.

    Returns False where the profile does not record its samples (nothing is compared then). Raises
    UsageError naming samples that both have.
    """
    known = profile.provenance.get(SAMPLES_KEY)
    if not isinstance(known, list):
        return False
    seen = {digest for digest in known if isinstance(digest, str)}
    shared = []
    for sample in track(samples, "comparing with the calibration", len(samples)):
        encoded = processor.encode([replace(sample, messages=tuple(open_images(sample))).messages])
        if short_digest(content_digest(sample, encoded)) in seen:
            shared.append(sample.id)
    if shared:
        named = ", ".join(repr(name) for name in shared[:_NAMED])
        more = f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else ""
        raise UsageError(
            f"the profile was calibrated on {len(shared)} of these {len(samples)} samples "
            f"({named}{more}): give held-out ones alone"
        )
    return True
