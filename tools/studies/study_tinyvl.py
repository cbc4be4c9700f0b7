"""What each choice in planning and indexing is worth, on tinyvl's calibration split.

    python -m tools.studies.study_tinyvl [--per-task 16] [--variants shipped,squares,...]
                                      [--first-seed 5000]

Calibrates on 64 samples of calibration/mini once per variant and answers questions of the
calibration split (never the held-out one) at 5, 8 and 10% of the dense bytes. Prints a markdown
table; docs/experiments.md quotes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

import hkvprof
from hkvprof.calibration import decide, recipe
from hkvprof.heads import KeepRule
from hkvprof.models.processing import Encoded
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply
from hkvprof.samples.read import load_samples
from hkvprof.selection.index import HeadTables, ProjectedIndex
from hkvprof.testbed.generator import make_sample
from tools.tinyvl.accuracy import same_reply

TASKS = ("ocr", "list", "find", "diff", "kv")
BUDGETS = (0.05, 0.08, 0.10)
FIRST_SEED = 5000
Edit = Callable[[Profile], Profile]


@contextmanager
def _constants(**values: Any) -> Iterator[None]:
    """Constants of the planning rule set to other values."""
    with ExitStack() as stack:
        for name, value in values.items():
            home = recipe if hasattr(recipe, name) else decide
            stack.enter_context(patch.object(home, name, value))
        yield


@contextmanager
def _exact_scores() -> Iterator[None]:
    """An index that scores with the true keys, at the bytes of the projected one."""
    build = ProjectedIndex.build.__func__  # type: ignore[attr-defined]

    def exact(cls: type, keys: Any, tables: HeadTables) -> ProjectedIndex:
        index: ProjectedIndex = build(cls, keys, tables)
        object.__setattr__(index, "_exact", keys.float())
        return index

    with (
        patch.object(ProjectedIndex, "build", classmethod(exact)),
        patch.object(ProjectedIndex, "logits", lambda self, query: query @ self._exact.T),
        patch.dict(os.environ, {"HKVPROF_NATIVE": "0"}),  # native kernels read the codes
    ):
        yield


def _only(names: tuple[str, ...]) -> Edit:
    """Leave these strategies (by the beginning of their names) in the menu."""

    def edit(profile: Profile) -> Profile:
        loss = profile.loss.copy()
        for number, strategy in enumerate(profile.strategies):
            if not strategy.name.startswith(names):
                loss[:, number] = INFEASIBLE
        return dataclasses.replace(profile, loss=loss)

    return edit


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row: how calibration, the finished profile and the runtime differ from what ships."""

    text: str
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: KeepRule | None = None
    edit: Edit = lambda profile: profile
    exact: bool = False


_PLAIN_MENU = tuple(dataclasses.replace(s, rerank=0) for s in recipe.MEASURED_MENU)

VARIANTS = {
    "shipped": Variant("as shipped"),
    "norerank": Variant("no reranking", {"MEASURED_MENU": _PLAIN_MENU}),
    "squares": Variant("mean squares, without the root", {"POWER": 1.0}),
    "output": Variant("planning by the output error alone", {"REPLY_WEIGHT": 0.0}),
    "reply": Variant("planning by the reply's margin alone", {"OUTPUT_WEIGHT": 0.0}),
    "keep48": Variant("4 sinks and 8 recent tokens in place of 2 and 4", keep=KeepRule(4, 8, 16)),
    "only64": Variant(
        "static or 64-bit index only", edit=_only(("static", "dynamic-projected-64"))
    ),
    "only32": Variant(
        "static or 32-bit index only", edit=_only(("static", "dynamic-projected-32"))
    ),
    "static": Variant("static only", edit=_only(("static",))),
    "exact": Variant("exact scores in place of the index, same bytes", exact=True),
}


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-task", type=int, default=16)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = hkvprof.load_model("tinyvl")
    samples = load_samples("calibration/mini", max_samples=64).samples
    asked = [
        make_sample(task, options.first_seed + i, images=(12, 16)[i % 2], split="calibration")
        for task in TASKS
        for i in range(options.per_task)
    ]
    prompts = [(sample.reply or "", processor.encode([sample.messages])) for sample in asked]
    out = sys.stdout
    out.write("| variant | " + " | ".join(f"{b:.0%}" for b in BUDGETS) + " |\n|---|---|---|---|\n")
    for name in options.variants.split(","):
        variant = VARIANTS[name]
        with _constants(**variant.constants):
            kept = hkvprof.Recipe(keep=variant.keep)
            profile = hkvprof.calibrate(model, processor, samples, kept)
        profile = variant.edit(profile)
        cells = [_accuracy(model, processor, profile, variant, prompts, b) for b in BUDGETS]
        out.write(f"| {variant.text} | " + " | ".join(f"{c:.2f}" for c in cells) + " |\n")
        out.flush()


@torch.no_grad()
def _accuracy(
    model: Any,
    processor: Any,
    profile: Profile,
    variant: Variant,
    prompts: list[tuple[str, Encoded]],
    budget: float,
) -> float:
    """Share of whole answers that are right."""
    right = []
    with (
        _exact_scores() if variant.exact else _constants(),
        apply(model, profile, budget=budget),
    ):
        for expected, encoded in prompts:
            inputs = encoded.to(model.device, model.dtype)
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            right.append(same_reply(processor.decode(ids[0, encoded.tokens :]), expected))
    return fmean(right)


if __name__ == "__main__":
    main()
