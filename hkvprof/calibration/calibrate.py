"""The calibration loop: samples in, profile out.

Per sample: prefill under the model's own attention, teacher-force the reply and the follow-up turns
in one pass, and reduce every layer to small rows of figures. Rows are merged in the order of their
sample ids, in float64, so that the order of samples does not matter. They can be kept in a folder:
then a run can be stopped, and several processes can share the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hkvprof.calibration import decide as classify
from hkvprof.calibration.evidence import CONSERVATIVE, MEAN
from hkvprof.calibration.group import ALONE, Group
from hkvprof.calibration.merge import Decision, build_profile
from hkvprof.calibration.probe import KAPPAS, RATIOS, Bench
from hkvprof.calibration.risk import Risk
from hkvprof.calibration.rows import SampleRow
from hkvprof.calibration.run import Run, Track, nothing_usable
from hkvprof.errors import SampleError, UsageError
from hkvprof.heads import KeepRule
from hkvprof.models.adapter import view_model
from hkvprof.models.approval import require_approval
from hkvprof.models.processing import ChatProcessor
from hkvprof.models.weights import require_gradients
from hkvprof.models.wrappers import unwrap
from hkvprof.profile.planning import DEFAULT, Rules
from hkvprof.profile.record import Profile
from hkvprof.samples.read import Sample

__all__ = ["KAPPAS", "RATIOS", "calibrate", "measure"]

Recipe = Literal["paper", "measured"]


def calibrate(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    *,
    recipe: Recipe = "measured",
    theta: float = 0.9,
    kappa: float = 0.10,
    coefficient: float = 1.0,
    chunk: int = 16,
    text_prior: float = 0.5,
    budget: float = 0.10,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    replies: Literal["given", "own"] = "given",
    track: Track | None = None,
    keep: KeepRule | None = None,
    rows: str | Path | None = None,
    group: Group = ALONE,
    rules: Rules = DEFAULT,
    risk: Risk = MEAN,
    conservative: bool = CONSERVATIVE,
) -> Profile:
    """Measure every KV head of `model` on `samples` and decide types and budgets.

    `recipe="measured"` chooses strategy and ratio per head to minimise the loss at the head's
    output and at the reply (docs/method.md); `"paper"` applies HybridKV's rule: static when
    text-centric sparsity, the mass of the top `kappa` of visible keys, reaches `theta`; static
    heads keep `coefficient` times the mean share of dynamic ones, up to `text_prior` of it text
    tokens first, dynamic ones chunks of `chunk` tokens. It reads prompts alone, no replies, and its
    profile has no loss curves. `budget` is the profile's default share; `seed`, with
    which the samples were chosen, is only recorded. With `on_error="skip"`, samples that cannot be
    used are left out; the provenance counts and names
    them (`skipped`, `skipped_ids`).
    `replies="own"` judges the model's own greedy replies in place of those in the samples (a sample
    without a reply is always judged by the model's own); `keep` are the tokens that every head
    keeps. `track(iterable, description, total)` may wrap the loops to show progress. With `rows`, a
    folder, every measured sample is kept there at once, and a run that was stopped goes on from it.
    With a `group` of processes (`distributed.together`), each of which calls this with the same
    samples, they share the work and all return the same profile, that of one process alone.

    `rules`, `risk` and `conservative` are those of evidence.Decision, for `measured`.

    Raises ModelError for unsupported models, SampleError for bad samples, UsageError for options
    out of range and for a folder of other conditions.
    """
    decision = Decision(
        theta, budget, kappa=kappa, coefficient=coefficient, seed=seed, rules=rules, risk=risk,
        conservative=conservative,
    )  # fmt: skip
    decision.check(recipe)
    constants = {"theta": theta, "coefficient": coefficient}
    classify.refuse_paper_constants(recipe, constants)
    bench = prepare_bench(model, processor, recipe, replies, keep, kappa, chunk, text_prior)
    run = Run(bench, recipe, on_error, track or _untracked, rows, group)
    ordered = _in_order(samples)
    tables, mine = run.measure(ordered, group.share(ordered))
    share = (mine, run.skipped)
    shares = [share] if group.in_step else group.collect(share)

    def decide() -> Profile:
        found, skipped = _joined(shares)
        return build_profile(run.conditions, found, tables, replace(decision, skipped=skipped))

    return group.from_leader(decide)


def measure(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    rows: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    recipe: Recipe = "measured",
    on_error: Literal["raise", "skip"] = "raise",
    replies: Literal["given", "own"] = "given",
    track: Track | None = None,
    keep: KeepRule | None = None,
    kappa: float = 0.10,
    chunk: int = 16,
    text_prior: float = 0.5,
) -> int:
    """Measure part `shard` (number, of how many) of the samples into a folder of rows.

    All shards get the same samples: the index is fitted on all of them. Returns how many rows this
    shard has there. `merge` makes a profile of the folder when all shards are done. Raises as
    `calibrate` does.
    """
    part, parts = shard
    if not 1 <= part <= parts:
        raise UsageError(f"shard is {part} of {parts}: expected 1 <= part <= parts")
    bench = prepare_bench(model, processor, recipe, replies, keep, kappa, chunk, text_prior)
    run = Run(bench, recipe, on_error, track or _untracked, rows, ALONE)
    ordered = _in_order(samples)
    mine = ordered[part - 1 :: parts]
    _, found = run.measure(ordered, mine)
    if mine and not found:
        raise nothing_usable(run.skipped)
    return len(found)


def prepare_bench(
    model: Any,
    processor: ChatProcessor,
    recipe: str,
    replies: str = "given",
    keep: KeepRule | None = None,
    kappa: float = 0.10,
    chunk: int = 16,
    text_prior: float = 0.5,
) -> Bench:
    """What all samples of a run share. Raises UsageError, ModelError."""
    if recipe not in ("paper", "measured"):
        raise UsageError(f"unknown recipe {recipe!r}: expected paper or measured")
    if replies not in ("given", "own"):
        raise UsageError(f"replies is {replies!r}: expected 'given' or 'own'")
    paper = recipe == "paper"
    if paper and replies == "own":
        raise UsageError("recipe 'paper' judges no replies: leave replies out, or choose measured")
    constants = {"kappa": kappa, "chunk": chunk, "text_prior": text_prior}
    classify.refuse_paper_constants(recipe, constants)
    if not 0 < kappa <= 1:
        raise UsageError(f"kappa must be a share in (0, 1], found {kappa}")
    view = view_model(model)
    require_approval(view)
    if not paper:
        require_gradients(unwrap(model))
    return Bench(
        model=model,
        processor=processor,
        view=view,
        menu=classify.paper_menu(chunk, text_prior) if paper else classify.MEASURED_MENU,
        kappas=tuple(sorted({*KAPPAS, kappa})),
        ratios=(1.0,) if paper else RATIOS,
        keep=keep or (KeepRule() if paper else classify.MEASURED_KEEP),
        own_replies=replies == "own",
    )


def _in_order(samples: Sequence[Sample]) -> list[Sample]:
    """By id. Raises SampleError where there are none, or two of one id."""
    if not samples:
        raise SampleError("there are no samples to calibrate on: expected at least one")
    identifier, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise SampleError(f"sample id {identifier!r} is given {count} times: ids must be unique")
    return sorted(samples, key=lambda sample: sample.id)


def _joined(
    shares: Sequence[tuple[list[SampleRow], dict[str, str]]],
) -> tuple[list[SampleRow], tuple[str, ...]]:
    """All rows, and the ids of all skipped samples. Raises SampleError where there are no rows."""
    rows = [row for found, _ in shares for row in found]
    skipped = {name: reason for _, reasons in shares for name, reason in reasons.items()}
    if not rows:
        raise nothing_usable(skipped)
    return rows, tuple(sorted(skipped))


def _untracked(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return iterable
