"""A rerun beside the published figures: a table for the terminal, a page to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hkvprof.evaluate.records import FULL, OURS
from hkvprof.evaluate.reproduce.published import (
    DIFFERENCES,
    GIGABYTES,
    IMAGES_MEAN,
    MODEL,
    SCORES,
    Row,
)
from hkvprof.evaluate.reproduce.scoring import BenchmarkScore
from hkvprof.report.folding import FoldingTable

COLUMNS = (IMAGES_MEAN, "VATEX", "NExT-OE", "Video-ChatGPT")
UNITS = {
    IMAGES_MEAN: "mean over tasks, %", "VATEX": "CIDEr", "NExT-OE": "WUPS, %",
    "Video-ChatGPT": "judge, 0 to 5",
}  # fmt: skip
_SMALL = ("VATEX",)
Figures = Mapping[tuple[str, str, str], BenchmarkScore]


def reproduction_table(scores: Sequence[BenchmarkScore], model: str) -> FoldingTable:
    """One row per method and budget: here, and published where the model is the paper's."""
    known = _known(scores)
    table = FoldingTable(
        "method", "budget", *_headings(), "share", keys=2, right=[*_headings(), "share"]
    )
    for row in _rows(scores):
        table.add_row(row[0], row[1] or "-", *_cells(row, known, model), _share(row, scores))
    return table


def notes(scores: Sequence[BenchmarkScore], model: str) -> list[str]:
    """What the columns mean, and what is not complete."""
    units = "; ".join(f"{name}: {unit}" for name, unit in UNITS.items())
    lines = [units, "share: resident K/V bytes over dense, indexes included"]
    published = "behind the stroke: arXiv 2604.05887, Qwen2.5-VL-7B"
    lines.append(published if _is_paper(model) else f"{published}, another model than this one")
    short = sorted({s.benchmark for s in scores if s.answered < s.questions} - {IMAGES_MEAN})
    if short:
        lines.append(f"not complete yet: {', '.join(short)}; run again, or the other shards")
    if any(s.benchmark == "Video-ChatGPT" and s.value is None for s in scores):
        lines.append("Video-ChatGPT is answered, not judged: run again with --judge URL")
    return lines


def reproduction_page(scores: Sequence[BenchmarkScore], model: str, judge: str) -> str:
    """The whole report in Markdown: figures beside the published ones, tasks, what differs."""
    known = _known(scores)
    head = ["method", "budget", *_headings(), "share of bytes", "published GB"]
    rows = [
        [row[0], row[1] or "-", *_cells(row, known, model), _share(row, scores), _gigabytes(row)]
        for row in _rows(scores)
    ]
    tasks = [s for s in scores if s.benchmark not in COLUMNS]
    detail = [
        [s.benchmark, s.method, s.budget or "-", _write(s.value, 2), f"{s.answered}/{s.questions}",
         f"{s.share:.1%}"]
        for s in [*tasks, *(s for s in scores if s.benchmark in COLUMNS)]
    ]  # fmt: skip
    parts = [
        f"# HybridKV (arXiv 2604.05887) on {model}",
        "Each cell: here / published (for Qwen2.5-VL-7B).",
        _markdown(head, rows),
        *(f"- {line}" for line in notes(scores, model)),
        *([f"- judge: {judge}"] if judge else []),
        "## What differs from the paper",
        *(f"- {line}" for line in DIFFERENCES),
        "## Every benchmark",
        _markdown(["benchmark", "method", "budget", "score", "answered", "share"], detail),
    ]
    return "\n\n".join(parts) + "\n"


def _known(scores: Sequence[BenchmarkScore]) -> Figures:
    return {(s.benchmark, s.method, s.budget): s for s in scores}


def _rows(scores: Sequence[BenchmarkScore]) -> list[Row]:
    """What was asked and what is published, full cache first, then by falling budget."""
    found = dict.fromkeys([*((s.method, s.budget) for s in scores), *SCORES])

    def place(row: Row) -> tuple[float, int]:
        return -float(row[1] or 2), {FULL: 0, OURS: 1}.get(row[0], 2)

    return sorted(found, key=place)


def _headings() -> list[str]:
    return [name if name != IMAGES_MEAN else "MileBench" for name in COLUMNS]


def _cells(row: Row, known: Figures, model: str) -> list[str]:
    cells = []
    for name in COLUMNS:
        here, there = known.get((name, *row)), SCORES.get(row, {}).get(name)
        digits = 4 if name in _SMALL else 2
        shown = _write(here.value if here else None, digits)
        cells.append(f"{shown} / {_write(there, digits)}" if _is_paper(model) else shown)
    return cells


def _share(row: Row, scores: Sequence[BenchmarkScore]) -> str:
    shares = [s.share for s in scores if (s.method, s.budget) == row and s.benchmark != IMAGES_MEAN]
    return f"{sum(shares) / len(shares):.1%}" if shares else "-"


def _gigabytes(row: Row) -> str:
    return f"{GIGABYTES[row]:.2f}" if row in GIGABYTES else "-"


def _write(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _is_paper(model: str) -> bool:
    """Whether the published figures are of this model, by alias or hub id."""
    return model.lower().rstrip("/").rpartition("/")[2].startswith(MODEL)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
