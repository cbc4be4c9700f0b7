"""What is foreseen: the page and JSON of `hkvprof plan`, and a calibration's dry run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from hkvprof.calibration.estimate import Memory, Timing
from hkvprof.profile.budgets import Fetch
from hkvprof.profile.capacity import Fit
from hkvprof.profile.forecast import WHOLE, Forecast
from hkvprof.report.folding import FoldingTable, Grid
from hkvprof.report.measured import MeasuredQuality
from hkvprof.report.summary import human, percent
from hkvprof.report.terminal import (
    BOUNDS,
    Glyphs,
    glyphs,
    heads_picture,
    shade,
    shares_picture,
)

SCHEMA_VERSION = 1
KNEE = Fetch()
"""The reads of a plan that names none."""


@dataclass(frozen=True)
class Outlook:
    """All that `plan` says: budgets as asked, each with its forecast or why there is none.

    `dense` is the forecast of the whole cache, `drawn` the one whose layers are shown (None: there
    is none), `fit` the answer to --gpu; prompts below `min_tokens` stay dense at run time;
    `quality` is what was measured of answers, with the reads `fetch`: where it covers them, it is
    spoken of in place of the expected loss.
    """

    dtype: str
    dense: Forecast
    budgets: tuple[tuple[str, Forecast | str], ...]
    drawn: Forecast | None
    fit: Fit | None
    min_tokens: int
    quality: MeasuredQuality | None = None
    fetch: Fetch = KNEE

    @property
    def speaks_of_quality(self) -> bool:
        """Whether answers were judged with these reads."""
        return self.quality is not None and self.quality.covers(self.fetch)

    def found(self, plan: Forecast) -> str:
        """The measured quality of a plan in words; empty where none is known."""
        if self.quality is None or not self.speaks_of_quality:
            return ""
        return "dense" if plan.is_dense else self.quality.at(plan.share) or "not measured"


def to_json(outlook: Outlook) -> dict[str, Any]:
    """All of it as a JSON-ready dict; sizes are in bytes."""
    dense, fit = outlook.dense, outlook.fit
    return {
        "schema": SCHEMA_VERSION,
        "sentences": sentences(outlook),
        "tokens": dense.tokens,
        "batch": dense.rows,
        "dtype": outlook.dtype,
        "dense_bytes": dense.dense_bytes,
        "budgets": [
            {"budget": asked, "error": plan}
            if isinstance(plan, str)
            else {
                "budget": asked,
                **plan.to_json(with_layers=False),
                "fits": _fits(plan, fit),
                "quality": outlook.found(plan) or None,
            }
            for asked, plan in outlook.budgets
        ],
        "quality": outlook.quality and outlook.quality.to_json(),
        "fit": None if fit is None else _fit_json(fit),
        "plan": outlook.drawn and outlook.drawn.to_json(),
    }


def _fits(plan: Forecast, fit: Fit | None) -> bool | None:
    return None if fit is None else plan.peak_bytes <= fit.room.left


def _fit_json(fit: Fit) -> dict[str, Any]:
    return {
        **{f"{name}_bytes": size for name, size in asdict(fit.room).items()},
        "left_bytes": fit.room.left,
        "dense_fits": fit.dense_fits,
        "largest_budget": fit.best and fit.best.to_json(with_layers=False),
        "smallest_budget": fit.smallest and fit.smallest.to_json(with_layers=False),
        "default_budget": fit.budget,
        "longest_context": fit.context,
        "largest_batch": fit.batch,
        "dense_longest_context": fit.dense_context,
        "dense_largest_batch": fit.dense_batch,
    }


def page(outlook: Outlook, ascii_only: bool) -> RenderableType:
    """Sentences, the table of budgets, then one plan layer by layer."""
    marks, drawn = glyphs(ascii_only), outlook.drawn
    parts: list[RenderableType] = [Text(line) for line in sentences(outlook)]
    parts += [Text(), _table(outlook), *(Text(line) for line in _notes(outlook))]
    if drawn is not None:
        parts += [
            Text(),
            Text(f"At {_share(drawn.share)} of dense bytes:"),
            Text(),
            _types(drawn, marks),
            Text(),
            shares_picture(_ratios(drawn), drawn.share, marks),
            Text(),
            _layers(drawn, marks),
        ]
    return Group(*parts)


def sentences(outlook: Outlook) -> list[str]:
    """The answer in words; the first sentence is about the dense cache."""
    dense, fit = outlook.dense, outlook.fit
    prompts = "A prompt" if dense.rows == 1 else f"{dense.rows:,} prompts"
    verb = "needs" if dense.rows == 1 else "need"
    first = (
        f"{prompts} of {dense.tokens:,} tokens {verb} {human(dense.dense_bytes)} of dense keys and "
        f"values in {outlook.dtype}"
    )
    lines = [f"{first}."]
    if fit is not None:
        taken = dense.dense_bytes + fit.room.weights + fit.room.reserve
        lines = [
            f"{first}; with {human(fit.room.weights)} of weights and {human(fit.room.reserve)} in "
            f"reserve that is {human(taken)} of {human(fit.room.gpu)}: it "
            f"{'fits' if fit.dense_fits else 'does not fit'}.",
            *_fit_sentences(fit, outlook),
        ]
    if dense.tokens < outlook.min_tokens:
        lines.append(
            f"Prompts below {outlook.min_tokens} tokens stay dense at run time, unless min_tokens "
            "is set lower: the figures below are for that."
        )
    return lines


def _fit_sentences(fit: Fit, outlook: Outlook) -> list[str]:
    room = fit.room
    if room.left <= 0:
        over = human(room.weights + room.reserve)
        return [f"Nothing fits: weights and reserve alone take {over} of {human(room.gpu)}."]
    lines = []
    if fit.best is None and fit.smallest is None:
        lines.append("This profile has no smaller budget for prompts as short as these.")
    elif fit.best is None and fit.smallest is not None:
        lines.append(
            f"Not even the smallest budget does, {_share(fit.smallest.share)}: it needs "
            f"{human(fit.smallest.peak_bytes)} at its peak, and {human(room.left)} are left."
        )
    elif fit.best is not None and not fit.dense_fits:
        lines.append(_best(fit.best, outlook.found(fit.best)))
    return [*lines, _reach(fit)]


def _best(best: Forecast, found: str) -> str:
    host = f", {human(best.host_bytes)} in host memory" if best.host_bytes else ""
    return (
        f"The largest budget that fits is {_share(best.share)}: {human(best.resident_bytes)} "
        f"resident, {human(best.table_bytes)} of tables, {human(best.peak_bytes)} at the "
        f"peak{host}; {f'quality: {found}' if found else f'expected loss {_loss(best)}'}."
    )


def _reach(fit: Fit) -> str:
    """How far the default budget goes, and how far no compression."""
    rows = "one prompt" if fit.rows == 1 else f"{fit.rows:,} prompts"
    context = f"{rows} of up to {fit.context:,} tokens (dense: {fit.dense_context:,})"
    batch = f"batches of up to {fit.batch:,} at {fit.tokens:,} tokens (dense: {fit.dense_batch:,})"
    what = [part for part, most in ((context, fit.context), (batch, fit.batch)) if most]
    answer = ", or ".join(what) or "no prompt of any length"
    return f"The default budget of {percent(fit.budget)} takes {answer}."


def _share(share: float) -> str:
    """A share in percent, never more than it is: `48.23%`."""
    return f"{int(share * 10_000 + 1e-6) / 100:.4g}%"


def _loss(plan: Forecast) -> str:
    if plan.expected_loss is None:
        return "unknown"
    bound = ">= " if plan.below_measured else ""
    relative = "" if plan.relative_loss is None else f" ({percent(plan.relative_loss)})"
    return f"{bound}{plan.expected_loss:.3g}{relative}"


def _table(outlook: Outlook) -> FoldingTable:
    fits = [] if outlook.fit is None else ["fits"]
    table = FoldingTable(
        "budget",
        "resident",
        "share",
        "tables",
        "device",
        "peak",
        "host",
        "reads",
        "at most",
        "static",
        "quality" if outlook.speaks_of_quality else "expected loss",
        *fits,
    )
    for asked, plan in outlook.budgets:
        if isinstance(plan, str):
            table.add_row(asked, *["-"] * (10 + len(fits)))
            continue
        once = (plan.table_bytes, plan.device_bytes, plan.peak_bytes, plan.host_bytes)
        answer = _fits(plan, outlook.fit)
        last = [] if answer is None else ["yes" if answer else "no"]
        resident = (human(plan.resident_bytes), percent(plan.resident_share))
        reads = (percent(plan.read_share), percent(plan.most_read_share))
        types = percent(plan.static_share)
        table.add_row(asked, *resident, *map(human, once), *reads, types,
                      outlook.found(plan) or _loss(plan), *last)  # fmt: skip
    return table


def _notes(outlook: Outlook) -> list[str]:
    """What the columns mean, and why rows are empty."""
    dense = outlook.dense
    lines = [
        "share: resident over dense bytes; tables: constants of heads, once per model and not in "
        "it; device: resident and tables; peak: and one dense layer, while the prompt comes in",
        "reads: from host memory per decoding step, over dense bytes: in the mean, and at most; "
        "static: heads that never read",
    ]
    failed = [plan for _, plan in outlook.budgets if isinstance(plan, str)]
    if outlook.quality is not None and outlook.speaks_of_quality:
        return [*lines, outlook.quality.basis, *failed]
    if dense.reference_loss is None:
        lines.append("loss: unknown, this profile measured nothing to compare with")
    else:
        lines.append(
            f"loss: what planning minimises; 100% is every head pruned to "
            f"{percent(dense.least_share)} without fetching ({dense.reference_loss:.3g})"
        )
    if any(not isinstance(plan, str) and plan.below_measured for _, plan in outlook.budgets):
        least = percent(dense.least_share)
        lines.append(f">=: some heads keep less than {least}, the least share measured")
    if outlook.quality is not None:
        lines.append(
            f"quality: measured with other reads than these ({outlook.fetch}): "
            f"{outlook.quality.fetch}"
        )
    return lines + failed


def _ratios(plan: Forecast) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[head.ratio for head in layer.heads] for layer in plan.layers])


def _types(plan: Forecast, marks: Glyphs) -> Grid:
    drawn = {
        "static": (marks.static, marks.static_style),
        "dynamic": (marks.dynamic, marks.dynamic_style),
        WHOLE: (marks.whole, ""),
    }
    means = {"static": "pruned once", "dynamic": "fetched on demand", WHOLE: "kept as it is"}
    kinds = [head.kind for layer in plan.layers for head in layer.heads]
    legend = Text("Head types: ")
    for kind, (glyph, style) in drawn.items():
        legend.append(glyph, style).append(f" {kind} ({means[kind]}, {kinds.count(kind)})  ")
    legend.rstrip()
    return heads_picture(
        len(plan.layers),
        len(plan.layers[0].heads),
        legend,
        lambda layer, head: drawn[plan.layers[layer].heads[head].kind],
    )


def _layers(plan: Forecast, marks: Glyphs) -> Grid:
    """Bytes and losses per layer, relative to the mean layer."""
    resident = np.array([layer.resident_bytes for layer in plan.layers], dtype=np.float64)
    rows = {"resident": resident}
    if plan.expected_loss is not None:
        rows["loss"] = np.array([layer.loss for layer in plan.layers])
    relative = [values / (float(values.mean()) or 1.0) for values in rows.values()]
    ranges = [f"< {BOUNDS[0]:g}", *(f">= {bound:g}" for bound in BOUNDS)]
    legend = Text("Layers, times the mean: ")
    legend.append("  ".join(f"{s} {r}" for s, r in zip(marks.shades, ranges, strict=True)))
    return Grid(
        len(plan.layers),
        list(rows),
        legend,
        lambda layer, row: (shade(float(relative[row][layer]), marks), ""),
    )


# -- calibration's dry run ------------------------------------------------------------------------

_PASSES = "memory is counted from shapes, without a vision tower's activations"


@dataclass(frozen=True)
class DryRun:
    """What a calibration would take.

    `tokens` of all usable samples' prompts, `measured` of the samples have rows already; `seconds`
    are for what is left. `timing` is None where the model could not be loaded: `untimed` says why.
    """

    samples: int
    unusable: dict[str, str]
    measured: int
    tokens: list[int]
    memory: Memory
    timing: Timing | None
    seconds: float | None
    untimed: str = ""

    @property
    def basis(self) -> str:
        """What the figures rest on."""
        if self.timing is None:
            return f"time is unknown ({self.untimed}); {_PASSES}"
        return (
            f"time is that of one sample of {self.timing.tokens:,} tokens, on this machine, per "
            f"token: much longer prompts take longer; {_PASSES}"
        )

    def to_json(self) -> dict[str, Any]:
        """The dry run as a JSON-ready dict."""
        return {
            "samples": self.samples,
            "unusable": self.unusable,
            "measured": self.measured,
            "tokens": {
                "total": sum(self.tokens),
                "min": min(self.tokens),
                "max": max(self.tokens),
            },
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "memory": {**asdict(self.memory), "peak": self.memory.peak},
            "timing": self.timing and asdict(self.timing),
            "basis": self.basis,
        }

    def lines(self) -> list[str]:
        """The dry run in words, as lines."""
        memory, spare = self.memory, ""
        if self.unusable:
            spare = f"; {len(self.unusable)} cannot be used"
        parts = {
            "weights": memory.weights,
            "keys and values": memory.cache,
            "one layer over the prompt": memory.prompt,
            "the reply's gradients": memory.reply,
            "statistics": memory.statistics,
        }
        return [
            f"samples  {self.samples}, {self.measured} of them measured already{spare}",
            f"tokens   {sum(self.tokens):,}, {min(self.tokens):,} to {max(self.tokens):,} a sample",
            f"memory   {human(memory.peak)} at the peak, in the longest sample: "
            + ", ".join(f"{name} {human(size)}" for name, size in parts.items()),
            f"time     {'unknown' if self.seconds is None else duration(self.seconds)}",
            f"basis    {self.basis}",
        ]


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
