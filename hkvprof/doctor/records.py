"""What the doctor finds: one outcome per check, and the report to paste into a bug report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


class FaultError(Exception):
    """A check found a fault: `what` was seen and its likely `cause`."""

    def __init__(self, what: str, cause: str) -> None:
        super().__init__(what)
        self.what, self.cause = what, cause


class NotApplicableError(Exception):
    """A check does not fit this model or installation; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """One check: what it found, and for a failure the likely cause."""

    name: str
    status: Status
    detail: str
    cause: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What a profile's fingerprint says to the model: fields that differ where they must not
    (`mismatches`), and what differs without changing attention (`notes`)."""

    mismatches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All outcomes, and what the reader of a bug report asks first."""

    outcomes: tuple[Outcome, ...]
    fingerprint: dict[str, Any]
    environment: dict[str, str]
    profile: Verdict | None = None
    approved: str = ""
    """Where it is recorded that this architecture passed; empty where no record is needed."""

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(o for o in self.outcomes if o.status is Status.FAILED)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "passed": not self.failures,
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "profile": None if self.profile is None else asdict(self.profile),
            "fingerprint": self.fingerprint,
            "environment": self.environment,
            "approved": self.approved,
        }
