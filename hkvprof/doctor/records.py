"""What the doctor finds: one outcome per check, and the report to paste into a bug report."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.bench.machine import device_name
from hkvprof.models.vision import torchvision_problem
from hkvprof.runtime import kernels


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
        """Outcomes of the checks that failed."""
        return tuple(o for o in self.outcomes if o.status is Status.FAILED)

    def to_json(self) -> dict[str, Any]:
        """All outcomes and facts as a JSON-ready dict."""
        return {
            "passed": not self.failures,
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "profile": None if self.profile is None else asdict(self.profile),
            "fingerprint": self.fingerprint,
            "environment": self.environment,
            "approved": self.approved,
        }


def environment(model: Any) -> dict[str, str]:
    """Facts that a bug report needs, by name; no paths and no names of machines or people."""
    return {
        "hkvprof": hkvprof.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "torchvision": _torchvision(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "kernels": kernels.status(),
    }


def _torchvision() -> str:
    problem = torchvision_problem()
    if problem:
        return f"not used: {problem}"
    import torchvision

    return str(torchvision.__version__)
