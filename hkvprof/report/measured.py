"""How good a profile's answers were found to be, budget by budget: by a certificate or evaluation.

What planning minimises compares budgets of one profile, and is no share of wrong answers. Where
answers were judged, they are spoken of instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkvprof.errors import BudgetError
from hkvprof.evaluate.journal import read_answers, read_conditions
from hkvprof.evaluate.records import OURS, REGIMES
from hkvprof.evaluate.statistics import MethodSummary, summarise
from hkvprof.profile.budgets import Budget, Fetch
from hkvprof.profile.certificate import Certificate, Level
from hkvprof.profile.record import Profile
from hkvprof.report.certainty import claim_text, plain

_NEAR = 1e-9


@dataclass(frozen=True)
class MeasuredQuality:
    """What was found at shares of dense bytes, rising, each in words; `basis` is what the words
    mean and rest on, `fetch` what a step could read (str of a budgets.Fetch)."""

    levels: tuple[tuple[float, str], ...]
    basis: str
    fetch: str

    def at(self, share: float) -> str:
        """In words, what was found at `share`, or at the nearest smaller one, which keeps less;
        empty where there is none."""
        known = [level for level in self.levels if level[0] <= share + _NEAR]
        if not known:
            return ""
        found, said = known[-1]
        return said if abs(found - share) <= _NEAR else f"at {100 * found:.4g}%: {said}"

    def covers(self, fetch: Fetch) -> bool:
        """Whether it was found with these reads: with fewer, answers may be worse."""
        return self.fetch == str(fetch)

    def to_json(self) -> dict[str, Any]:
        """All of it as a JSON-ready dict."""
        levels = [{"share": share, "found": said} for share, said in self.levels]
        return {"levels": levels, "basis": self.basis, "fetch": self.fetch}


def measured(profile: Profile, evaluation: Path | None = None) -> MeasuredQuality | None:
    """What the folder of an evaluation says or, without one, the profile's own certificate; None
    where there is neither.

    Whether the folder is of this profile is to be asked before (evaluate.belonging). Raises
    UsageError for a folder that cannot be read.
    """
    if evaluation is not None:
        return _evaluated(evaluation)
    certificate = profile.certificate
    return None if certificate is None else _certified(certificate)


def covering(profile: Profile, fetch: Fetch) -> MeasuredQuality | None:
    """As `measured`, by the certificate alone; None where it is of other reads."""
    found = measured(profile)
    return found if found is not None and found.covers(fetch) else None


def _certified(record: Certificate) -> MeasuredQuality:
    differs = "is worse than" if record.loss == "answers" else "differs from"
    basis = (
        f"quality: of {plain(record.data)}, held out, the samples one of whose answers {differs} "
        f"the full cache's ({plain(list(record.regimes))}; reads: {plain(record.fetch)})"
    )
    if record.certified is not None:
        claim = claim_text(record.alpha, record.delta, record.loss)
        basis += f"; at {100 * record.certified:g}%, {claim}"
    levels = sorted((level.budget, _degraded(level, record)) for level in record.levels)
    return MeasuredQuality(tuple(levels), basis, record.fetch)


def _degraded(level: Level, record: Certificate) -> str:
    word = "worse" if record.loss == "answers" else "differ"
    return f"{level.degraded} of {level.samples} {word}" if level.samples else "not tested"


def _evaluated(folder: Path) -> MeasuredQuality | None:
    summaries = [one for one in summarise(read_answers(folder)) if one.method == OURS]
    regime = next((name for name in REGIMES if any(s.regime == name for s in summaries)), None)
    levels = sorted(_levels([one for one in summaries if one.regime == regime]))
    if not levels:
        return None
    conditions = read_conditions(folder)
    basis = (
        "quality: points of score to the full cache on the same questions, else nats of KL to it, "
        f"with 95% intervals over samples of {plain(conditions.get('tasks', folder.name))} "
        f"({regime}: {REGIMES[str(regime)]})"
    )
    return MeasuredQuality(tuple(levels), basis, str(conditions.get("fetch", Fetch())))


def _levels(summaries: Sequence[MethodSummary]) -> Iterator[tuple[float, str]]:
    for one in summaries:
        try:
            share = Budget.parse(one.budget).share
        except BudgetError:
            continue
        if share is not None:
            yield share, _difference(one)


def _difference(one: MethodSummary) -> str:
    if (found := one.difference) is not None:
        value, low, high = (100 * x for x in (found.value, found.low, found.high))
        return f"{value:+.1f} points [{low:.1f}, {high:.1f}]"
    return f"KL {one.kl.value:.2g} [{one.kl.low:.2g}, {one.kl.high:.2g}]"
