"""Runs the checks one by one; none keeps another from running."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hkvprof.doctor import compressed, exact
from hkvprof.doctor.conversations import Patient
from hkvprof.doctor.records import (
    FaultError,
    NotApplicableError,
    Outcome,
    Report,
    Status,
    Verdict,
    environment,
)
from hkvprof.errors import HkvError, UsageError
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.approval import approve, under_examination, withdraw
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.record import Profile


@dataclass(frozen=True)
class Check:
    """A check by its name for `--only`: a function that says what it found, or raises."""

    name: str
    run: Callable[[Patient], str]

    @property
    def about(self) -> str:
        """What the check looks at, in one line."""
        return (self.run.__doc__ or "").splitlines()[0]


CHECKS = (
    Check("text", exact.text),
    Check("image", exact.image),
    Check("images", exact.images),
    Check("video", exact.video),
    Check("batch", exact.batch),
    Check("turns", exact.turns),
    Check("requests", exact.requests),
    Check("long", exact.long),
    Check("beams", exact.beams),
    Check("lookup", exact.lookup),
    Check("masked-text", compressed.text),
    Check("masked-batch", compressed.batch),
    Check("masked-bits", compressed.bits),
    Check("masked-images", compressed.images),
    Check("masked-requests", compressed.requests),
    Check("masked-chunks", compressed.chunks),
    Check("masked-logits", compressed.logits),
    Check("memory", compressed.memory),
)
"""The first ten at budget 1.0, to the bit; then at a small budget."""

Track = Callable[[Iterable[Check]], Iterable[Check]]


def choose(names: Sequence[str]) -> tuple[Check, ...]:
    """The checks of these names, in their order here; all for none. Raises UsageError."""
    known = {check.name: check for check in CHECKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no check {unknown[0]!r}: expected some of {', '.join(known)}")
    return tuple(check for check in CHECKS if not names or check.name in names)


def examine(
    model: Any,
    processor: ChatProcessor | None = None,
    profile: Profile | None = None,
    only: Sequence[str] = (),
    track: Track = iter,
) -> Report:
    """Check hkvprof on a loaded model; a profile of another model is reported, not used.

    Where all checks pass, a model of an unlisted architecture may be used from then on; where one
    fails, no longer. `track` shows progress. Raises ModelError for refused models.
    """
    checks = choose(only)
    view = view_model(model)
    verdict = None if profile is None else judge(profile, view)
    fits = verdict is not None and not verdict.mismatches
    patient = Patient(model, view, processor, profile if fits else None)
    outcomes = tuple(_outcomes(patient, track(checks)))
    fingerprint = {**view.fingerprint.to_json(), "generic": view.generic}
    report = Report(outcomes, fingerprint, environment(model), verdict)
    if not view.unproven:
        return report
    if report.failures:
        withdraw(view)
    elif len(checks) == len(CHECKS):
        return Report(outcomes, fingerprint, environment(model), verdict, str(approve(view)))
    return report


def judge(profile: Profile, view: ModelView) -> Verdict:
    """A profile's fingerprint against the model's, tier by tier."""
    mine, theirs = profile.fingerprint, view.fingerprint
    notes = []
    if mine.config_hash != theirs.config_hash:
        notes.append("its config differs in fields that do not change attention")
    notes += [f"it was {remark}" for remark in mine.remarks(theirs)]
    return Verdict(tuple(mine.mismatches(theirs)), tuple(notes))


def _outcomes(patient: Patient, checks: Iterable[Check]) -> Iterator[Outcome]:
    with under_examination():
        for check in checks:
            began = time.perf_counter()
            status, detail, cause = _run(check, patient)
            yield Outcome(check.name, status, detail, cause, time.perf_counter() - began)


def _run(check: Check, patient: Patient) -> tuple[Status, str, str]:
    try:
        return Status.PASSED, check.run(patient), ""
    except NotApplicableError as reason:
        return Status.NOT_APPLICABLE, str(reason), ""
    except FaultError as fault:
        return Status.FAILED, fault.what, fault.cause
    except HkvError as error:
        return Status.FAILED, str(error), _REFUSED
    except Exception as error:  # a broken integration raises anything, and so do foreign models
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.name} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
        first = (str(error).strip() or "no message").splitlines()[0]
        return Status.FAILED, f"{type(error).__name__} in {where}: {first}", _RAISED


_REFUSED = (
    "hkvprof refused a pass of this check for the reason told: layers, rows or masks are not what "
    "an earlier pass said, the cache reports other lengths (get_seq_length, get_mask_sizes) than "
    "the logical ones, or an API moved in transformers"
)
_RAISED = (
    "the model or hkvprof gave up: lengths or shapes that do not fit each other, often because the "
    "cache reports its stored length instead of the logical one (get_seq_length, get_mask_sizes), "
    "or an API that moved in transformers"
)
