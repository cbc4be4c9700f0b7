"""How a calibration measures and decides: one record, passed whole from the caller to the profile.

The rows that samples leave depend on a part of it (`rows.Conditions`); the rest is decided when
they are merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from hkvprof.errors import UsageError, refuse_unknown
from hkvprof.heads import CALIBRATED, HeadType, KeepRule, Strategy

RATIOS = (0.01, 0.02, 0.03, 0.05, 0.065, 0.08, 0.10, 0.12, 0.15, 0.20, 0.30, 0.50, 0.70, 1.0)
"""Kept shares at which the recipe `measured` measures losses."""
KAPPAS = (0.02, 0.05, 0.10, 0.20)
"""Shares of the visible keys at which sparsity is measured, whatever the recipe."""

RERANK = 64
"""Candidates beyond the hot buffer: more of them no longer help (docs/retrieval.md)."""

MEASURED_MENU = (
    Strategy(HeadType.STATIC, pool=1),
    Strategy(HeadType.STATIC, pool=7, resident_bits=8),
    Strategy(HeadType.STATIC, pool=31, resident_bits=8),
    Strategy(HeadType.STATIC, pool=1, resident_bits=4),
    Strategy(HeadType.STATIC, pool=31, resident_bits=4),
    Strategy(HeadType.STATIC, pool=1, score=CALIBRATED, resident_bits=8),
    Strategy(HeadType.STATIC, pool=1, score=CALIBRATED, resident_bits=4),
    Strategy(HeadType.DYNAMIC, index="projected", bits=16, rerank=RERANK, resident_bits=8),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=RERANK, resident_bits=8),
    Strategy(HeadType.DYNAMIC, index="projected", bits=64, rerank=RERANK, resident_bits=8),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=RERANK),
)
"""What each of these adds, and which others added nothing: docs/experiments.md, "The menu"."""

MEASURED_KEEP = KeepRule(sinks=2, recent=4, window=16)
"""Fewer forced tokens than in the literature: scores and indexes find the useful ones themselves
(docs/experiments.md)."""

RecipeName = Literal["paper", "measured"]
Replies = Literal["given", "own"]

REMOVED = {
    "risk": "the mean over samples is what is planned for (docs/experiments.md): leave it out",
    "risk_level": "the mean over samples is what is planned for: leave it out",
    "transfer_weight": "what a step reads is said where a budget is (fetch): leave it out",
    "even": "three quarters of a budget are dealt evenly (docs/experiments.md): leave it out",
    "conservative": "types in doubt always have to be proven by the samples: leave it out",
}
"""Fields of earlier versions, and what to do instead."""

_OWN = {
    "paper": ("kappa", "chunk", "text_prior", "theta", "coefficient"),
}
"""Fields that one recipe alone asks about."""
_DECIDED = ("budget", "theta", "coefficient")
"""Fields that no row depends on."""


@dataclass(frozen=True)
class Recipe:
    """Everything that says how a calibration measures and decides.

    `name`: `measured` chooses strategy and ratio per head to minimise the loss at the head's output
    and at the reply; `paper` is HybridKV's rule (both: docs/method.md), reads prompts alone, no
    replies, and its profile has no loss curves. `budget` is the profile's default share of dense
    K/V bytes, all-in. `replies="own"` judges the model's own greedy replies in place of those in
    the samples (a sample without a reply is always judged by the model's own). `keep` are the
    tokens that every head keeps; None for the recipe's own rule. `seed`, by which samples were
    chosen, is only recorded.

    Of `paper`: a head is static when text-centric sparsity, the mass of the top `kappa` of visible
    keys, reaches `theta`; static heads keep `coefficient` times the mean share of dynamic ones, up
    to `text_prior` of it text tokens first, dynamic ones chunks of `chunk` tokens.

    Raises UsageError for what is out of range, and for what another recipe asks about.
    """

    def __new__(cls, *_: Any, **given: Any) -> Recipe:
        """Raises UsageError for a name that is no field."""
        refuse_unknown("Recipe", given, cls.__dataclass_fields__, REMOVED)
        return super().__new__(cls)

    name: RecipeName = "measured"
    budget: float = 0.10
    replies: Replies = "given"
    keep: KeepRule | None = None
    theta: float = 0.9
    kappa: float = 0.10
    coefficient: float = 1.0
    chunk: int = 16
    text_prior: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(RecipeName):
            raise UsageError(f"unknown recipe {self.name!r}: expected paper or measured")
        if self.replies not in get_args(Replies):
            raise UsageError(f"replies is {self.replies!r}: expected 'given' or 'own'")
        self._check_ranges()
        for owner, names in _OWN.items():
            if owner != self.name and (given := self._changed(names)):
                raise UsageError(
                    f"{', '.join(given)} belong to recipe {owner!r}, and the recipe is "
                    f"{self.name!r}: leave them out, or choose {owner}"
                )
        if self.name == "paper" and self.replies == "own":
            raise UsageError(
                "the recipe paper judges no replies: leave replies out, or choose measured"
            )

    def _check_ranges(self) -> None:
        if not 0 < self.budget <= 1:
            raise UsageError(f"the default budget must be a share in (0, 1], found {self.budget}")
        if not 0 < self.theta <= 1:
            raise UsageError(f"theta must lie in (0, 1], found {self.theta}")
        if not 0 < self.kappa <= 1:
            raise UsageError(f"kappa must be a share in (0, 1], found {self.kappa}")
        if not 0.01 <= self.coefficient <= 100:
            raise UsageError(f"coefficient must lie in [0.01, 100], found {self.coefficient}")
        if not 1 <= self.chunk <= 4096:
            raise UsageError(
                f"chunk is {self.chunk}: expected 1 to 4096 tokens (HybridKV: 16 to 64)"
            )
        if not 0 <= self.text_prior <= 1:
            raise UsageError(f"text_prior is {self.text_prior}: expected a share in [0, 1]")

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of these fields that are not at their default."""
        return [name for name in names if getattr(self, name) != getattr(Recipe, name)]

    @property
    def decided(self) -> list[str]:
        """Names of the fields, other than at their default, that are for `merge` to decide."""
        return self._changed(_DECIDED)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The menu: what a head may be. Of the paper text-prior pruning, and chunks of tokens
        behind their mean key."""
        if self.name == "measured":
            return MEASURED_MENU
        return (
            Strategy(HeadType.STATIC, pool=1, text_prior=float(self.text_prior)),
            Strategy(HeadType.DYNAMIC, index="mean", chunk=self.chunk),
        )

    @property
    def index_sizes(self) -> tuple[int, ...]:
        """Bits per token of the projected indexes to fit, rising; empty where there are none."""
        return tuple(sorted({s.bits for s in self.strategies if s.index == "projected"}))

    @property
    def keep_rule(self) -> KeepRule:
        """The tokens that every head keeps: `keep`, or the recipe's own rule."""
        return self.keep or (MEASURED_KEEP if self.name == "measured" else KeepRule())

    @property
    def kappas(self) -> tuple[float, ...]:
        """The kappas at which sparsity is measured, rising."""
        return tuple(sorted({*KAPPAS, self.kappa}))

    @property
    def ratios(self) -> tuple[float, ...]:
        """Abscissae of the loss curves; the whole prompt alone where none are measured."""
        return RATIOS if self.name == "measured" else (1.0,)


MEASURED = Recipe()
"""The default."""
