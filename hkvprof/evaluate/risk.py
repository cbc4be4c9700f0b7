"""Exact binomial tests of a risk: how many losses may be seen, and how many samples it takes.

A sample is lost or not; the hypothesis is that the risk (the share of all samples like these that
are lost) is above alpha. With k losses among n samples its p-value is P(Bin(n, alpha) <= k): valid
for independent samples of one risk, and, within the bounds of `Claim`, for independent samples of
unequal risk whose mean is above alpha, such as equally many of each task (Hoeffding 1956, Annals of
Mathematical Statistics 27, theorem 4: from one below the mean down, equal risks have the heavier
tail).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from scipy.stats import binom

from hkvprof.certificate import LOSSES, MOST_ALPHA, MOST_DELTA
from hkvprof.errors import BudgetError, UsageError


@dataclass(frozen=True)
class Claim:
    """What is to be certified: risk at most `alpha` with confidence 1 - `delta`, at the least of
    these shares of dense bytes that the data allows.

    `budgets` are in the order in which they are tested, from the largest down. Raises UsageError,
    BudgetError.
    """

    alpha: float
    delta: float
    budgets: tuple[float, ...]
    loss: str = "answers"
    regimes: tuple[str, ...] = ("inside", "later")

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
