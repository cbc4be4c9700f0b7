"""A certificate: the least budget whose degradation is below alpha with confidence 1 - delta.

It says something of held-out samples alone: `check_source` and `check_contents` compare with those
of the calibration.

Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052) with fixed-sequence testing and exact
binomial p-values. All budgets share one prefill per sample; a budget that cannot be
accepted any more is not asked again, nor are smaller ones: no verdict depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from scipy.stats import binom

from hkvprof.calibration.probe import content_digest
from hkvprof.calibration.rows import current_versions
from hkvprof.errors import BudgetError, UsageError
from hkvprof.evaluate.compare import Track, compare
from hkvprof.evaluate.contest import MIN_TOKENS, ComparisonPlan, MethodAtBudget, ProfiledModel
from hkvprof.evaluate.journal import Journal
from hkvprof.evaluate.records import FULL, Answer, TaskSet
from hkvprof.models.adapter import view_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.budgets import Fetch
from hkvprof.profile.certificate import (
    LOSSES,
    MOST_ALPHA,
    MOST_DELTA,
    Certificate,
    Level,
    fixed_sequence,
)
from hkvprof.profile.record import Profile
from hkvprof.samples.read import Sample, open_images, samples_digest
from hkvprof.samples.record import SAMPLES_KEY, short_digest


@dataclass(frozen=True)
class Claim:
    """What is to be certified: risk at most `alpha` with confidence 1 - `delta`, at the least of
    these shares of dense bytes that the data allows.

    `budgets` are in the order in which they are tested, from the largest down; `fetch` is what a
    step may read at all of them (budgets.Fetch). Raises UsageError, BudgetError.
    """

    alpha: float
    delta: float
    budgets: tuple[float, ...]
    loss: str = "answers"
    regimes: tuple[str, ...] = ("inside", "later")
    fetch: str | None = None

    def __post_init__(self) -> None:
        for name, most in (("alpha", MOST_ALPHA), ("delta", MOST_DELTA)):
            value = getattr(self, name)
            if not 0 < value <= most:
                raise UsageError(f"{name} is {value:g}: expected a share in (0, {most:g}]")
        if self.loss not in LOSSES:
            raise UsageError(
                f"unknown loss {self.loss!r}: expected "
                + "; ".join(f"{name} ({what})" for name, what in LOSSES.items())
            )
        if not self.budgets:
            raise BudgetError("there is no budget to certify: expected shares such as 0.5,0.2,0.1")
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise BudgetError(
                    f"a budget of {budget:g} cannot be certified: expected shares above 0 and "
                    "below 1 (the whole cache loses nothing)"
                )
        if any(low >= high for high, low in pairwise(self.budgets)):
            raise BudgetError("the budgets to certify must fall, and differ from each other")
        Fetch.parse(self.fetch)

    @property
    def needed(self) -> int:
        """Samples without which nothing can be certified, even if none is lost."""
        return math.ceil(math.log(self.delta) / math.log1p(-self.alpha) - 1e-12)

    def p_value(self, losses: int, samples: int) -> float:
        """P(Bin(samples, alpha) <= losses)."""
        return float(binom.cdf(losses, samples, self.alpha))

    def most_losses(self, samples: int) -> int:
        """With how many losses a budget is still accepted; -1 where the samples are too few."""
        if samples < self.needed:
            return -1
        most = int(binom.ppf(self.delta, samples, self.alpha))
        while most >= 0 and self.p_value(most, samples) > self.delta:
            most -= 1
        return most

    def check_samples(self, samples: int, what: str = "samples") -> None:
        """Raise UsageError where they cannot suffice."""
        if samples < self.needed:
            raise UsageError(
                f"{samples} {what} are too few: a risk of at most {self.alpha:g} with confidence "
                f"{1 - self.delta:g} takes at least {self.needed}, even if none of them degrades; "
                "give more samples, or a larger alpha or delta"
            )


_STEPS = 1
"""Forced tokens per question: distances do not count here, only the answers do."""


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
    shared = shared_samples(profile, processor, samples, track)
    if shared:
        raise UsageError(f"{calibrated_on(shared, samples)}: give held-out ones alone")
    return shared is not None


def calibrated_on(shared: Sequence[str], samples: Sequence[Sample]) -> str:
    """A sentence without its end: how many of the samples the calibration saw, and which."""
    named = ", ".join(repr(name) for name in shared[:_NAMED])
    more = f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else ""
    return (
        f"the profile was calibrated on {len(shared)} of these {len(samples)} samples "
        f"({named}{more})"
    )


def shared_samples(
    profile: Profile, processor: ChatProcessor, samples: Sequence[Sample], track: Track
) -> list[str] | None:
    """Ids of the samples that the calibration saw, by tokens, pixels and replies; None where the
    profile does not record its samples."""
    known = profile.provenance.get(SAMPLES_KEY)
    if not isinstance(known, list):
        return None
    seen = {digest for digest in known if isinstance(digest, str)}
    shared = []
    for sample in track(samples, "comparing with the calibration", len(samples)):
        encoded = processor.encode([replace(sample, messages=tuple(open_images(sample))).messages])
        if short_digest(content_digest(sample, encoded)) in seen:
            shared.append(sample.id)
    return shared


def judged(tasks: TaskSet, claim: Claim) -> TaskSet:
    """The samples of which the claim's loss can be taken."""

    def has_answer(sample: Sample) -> bool:
        known = sample.reply is not None or sample.id in tasks.gold
        first = bool({"inside", "after"} & set(claim.regimes))
        return (first and (known or claim.loss == "agreement")) or (
            bool(sample.followups) and "later" in claim.regimes
        )

    return replace(tasks, samples=tuple(s for s in tasks.samples if has_answer(s)))


def fitting(claim: Claim, tasks: TaskSet, given: bool) -> Claim:
    """Without `later` where no sample has a follow-up; raises UsageError if it was `given`."""
    if "later" not in claim.regimes or any(sample.followups for sample in tasks.samples):
        return claim
    if given:
        raise UsageError(
            f"no sample of {tasks.name} has a follow-up to ask in the regime 'later': leave it out "
            "of --regimes, or give samples with `followups` (docs/sample-format.md)"
        )
    return replace(claim, regimes=tuple(name for name in claim.regimes if name != "later"))


def conditions(model: Any, profile: Profile, tasks: TaskSet, claim: Claim) -> dict[str, Any]:
    """What the answers depend on, for a journal: neither alpha and delta nor the budgets."""
    return {
        "model": view_model(model).fingerprint.weights_digest,
        "dtype": _dtype(model),
        "profile": profile.content_digest,
        "data": samples_digest(tasks.samples),
        "max_new_tokens": tasks.max_new_tokens,
        "regimes": list(claim.regimes),
        "steps": _STEPS,
        **({} if claim.fetch is None else {"fetch": claim.fetch}),
    }


def certify(
    profiled: ProfiledModel,
    tasks: TaskSet,
    claim: Claim,
    journal: Journal | None = None,
    track: Track | None = None,
) -> Certificate:
    """Test the claim on `judged` samples, held out as `check_source` and `check_contents` tell.

    Answers that the journal holds are not asked for again. Raises UsageError where the samples are
    too few, BudgetError where a budget cannot be met on one of them.
    """
    claim.check_samples(len(tasks.samples))
    journal = journal or Journal(None, {})
    tally = Tally(claim, [sample.id for sample in tasks.samples], journal.answers)
    comparison = ComparisonPlan(
        tuple(map(_name, claim.budgets)), regimes=claim.regimes, steps=_STEPS
    )
    try:
        limited = replace(profiled, fetch=claim.fetch)
        compare(limited, tasks, comparison, journal, track, skip=tally.is_lost)
    except BudgetError as error:
        raise BudgetError(
            f"a budget cannot be met on these samples: {error}. Leave small ones out of --budgets, "
            "or use longer prompts; what was answered so far is kept"
        ) from None
    levels, samples = tally.levels()
    claim.check_samples(samples, "samples that could be asked")
    certified = fixed_sequence(levels, samples, claim.delta)
    return Certificate(
        alpha=claim.alpha,
        delta=claim.delta,
        loss=claim.loss,
        samples=samples,
        levels=levels,
        certified=certified,
        reason=_reason(levels[0], claim, samples) if certified is None else "",
        regimes=claim.regimes,
        full_score=tally.full_score(),
        content=profiled.profile.content_digest,
        weights_digest=view_model(profiled.model).fingerprint.weights_digest,
        dtype=_dtype(profiled.model),
        data=tasks.name,
        data_digest=samples_digest(tasks.samples),
        options={"min_tokens": MIN_TOKENS, "max_new_tokens": tasks.max_new_tokens},
        fetch=str(Fetch.parse(claim.fetch)),
        versions=dict(current_versions()),
    )


class Tally:
    """Losses per budget, as answers come in; `answers` may grow.

    A sample counts once, however many of its questions are lost.
    """

    def __init__(self, claim: Claim, samples: Sequence[str], answers: Sequence[Answer]) -> None:
        self.claim, self.answers = claim, answers
        self._wanted = set(samples)
        self._most = claim.most_losses(len(self._wanted))
        self._budgets = list(map(_name, claim.budgets))
        self._full: dict[tuple[str, str, int], Answer] = {}
        self._asked: dict[str, set[str]] = {name: set() for name in self._budgets}
        self._lost: dict[str, set[str]] = {name: set() for name in self._budgets}
        self._read = 0

    def is_lost(self, entry: MethodAtBudget) -> bool:
        """Whether this budget cannot be accepted any more, or a larger one cannot."""
        self._catch_up()
        upto = self._budgets[: self._budgets.index(entry.budget) + 1]
        return any(len(self._lost[budget]) > self._most for budget in upto)

    def levels(self) -> tuple[tuple[Level, ...], int]:
        """Counts and p-values of every budget, and how many samples could be asked at all."""
        self._catch_up()
        total = len({sample for sample, _, _ in self._full})
        levels = []
        for name, budget in zip(self._budgets, self.claim.budgets, strict=True):
            lost = len(self._lost[name])
            p_value = self.claim.p_value(lost, total)
            levels.append(Level(budget, len(self._asked[name]), lost, p_value))
        return tuple(levels), total

    def full_score(self) -> float | None:
        """Mean score of the full cache's answers; None where none was scored."""
        scores = [answer.score for answer in self._full.values() if answer.score is not None]
        return fmean(scores) if scores and self.claim.loss == "answers" else None

    def _catch_up(self) -> None:
        """Enter the answers that are new: a sample's full cache answers before its budgets do."""
        for answer in self.answers[self._read :]:
            place = (answer.sample, answer.regime, answer.turn)
            if answer.sample not in self._wanted:
                continue
            if answer.method == FULL:
                self._full[place] = answer
            elif answer.budget in self._asked:
                self._asked[answer.budget].add(answer.sample)
                if LOST[self.claim.loss](self._full[place], answer):
                    self._lost[answer.budget].add(answer.sample)
        self._read = len(self.answers)


def _scores_less(full: Answer, compressed: Answer) -> bool:
    if full.score is None or compressed.score is None:
        return False
    return compressed.score < full.score


def _differs(full: Answer, compressed: Answer) -> bool:
    return compressed.text != full.text


LOST: dict[str, Callable[[Answer, Answer], bool]] = {
    "answers": _scores_less,
    "agreement": _differs,
}
"""Per loss (certificate.LOSSES): whether a question is lost, from the full cache's answer and the
compressed one's."""


def parse_budgets(text: str) -> tuple[float, ...]:
    """Shares, from the largest down. Raises BudgetError."""
    from hkvprof.profile.budgets import Budget

    shares = []
    for part in (part.strip() for part in text.split(",")):
        share = Budget.parse(part).share
        if share is None:
            raise BudgetError(
                f"a budget of {part!r} cannot be certified: expected shares of dense bytes such as "
                "0.10 or 10%, since tokens and bytes are different shares of every prompt"
            )
        shares.append(share)
    return tuple(sorted(shares, reverse=True))


def _reason(first: Level, claim: Claim, samples: int) -> str:
    most = claim.most_losses(samples)
    return (
        f"{first.degraded} of {first.samples} samples degraded at {first.budget:g}, the largest "
        f"budget; at most {most} of {samples} may"
    )


def _name(budget: float) -> str:
    return f"{budget:g}"


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
