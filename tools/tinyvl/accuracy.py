"""Accuracy of a tinyvl checkpoint: `python -m tools.tinyvl.accuracy`.

Greedy `generate()` on held-out samples, per task and number of images; a reply counts when it is
right as a whole, white space aside. Tasks under 60% are not used to judge compression.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hkvprof.errors import HkvError, UsageError
from hkvprof.models.load import load_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import TASKS, SampleShape, heldout_samples

JUDGE_THRESHOLD = 0.6
"""A task below this accuracy in some cell says little about what compression loses."""

TABLE_START = "<!-- accuracy table {name} -->"
TABLE_END = "<!-- end of table -->"


@dataclass(frozen=True)
class Cell:
    """The result for one task and number of images."""

    task: str
    images: int
    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Share of right replies."""
        return self.right / self.asked


def same_reply(given: str, expected: str) -> bool:
    """Whether two replies agree, white space aside."""
    return "".join(given.split()) == "".join(expected.split())


@torch.no_grad()
def greedy_replies(
    model: Any, processor: ChatProcessor, samples: Sequence[Sample], batch_size: int = 8
) -> list[str]:
    """The model's greedy reply to each sample; prompts of a batch are padded on the left."""
    replies: list[str] = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        encoded = processor.encode([list(sample.messages) for sample in chunk])
        inputs = encoded.to(model.device, model.dtype)
        longest = max(len(processor.encode_text(sample.reply or "")) for sample in chunk)
        output = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
        replies += [processor.decode(row) for row in output[:, encoded.tokens :]]
    return replies


def measure(
    model: Any,
    processor: ChatProcessor,
    per_cell: int,
    shapes: Sequence[SampleShape],
    report: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Accuracy in every cell of tasks x shapes; `report` is told of each cell when done."""
    cells = []
    for shape in shapes:
        for name, task in TASKS.items():
            if shape.images == 1 and task.needs_several_images:
                continue
            samples = list(heldout_samples([name], per_cell, shape))
            replies = greedy_replies(model, processor, samples)
            right = sum(
                same_reply(reply, sample.reply or "")
                for reply, sample in zip(replies, samples, strict=True)
            )
            cells.append(Cell(name, shape.images, right, per_cell))
            report(cells[-1])
    return cells


def weak_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells under the threshold."""
    return [cell for cell in cells if cell.accuracy < JUDGE_THRESHOLD]


def markdown_table(cells: Sequence[Cell], command: str) -> str:
    """The results as a table with the command that made it and the weak tasks."""
    counts = sorted({cell.images for cell in cells})
    found = {(cell.task, cell.images): cell.accuracy for cell in cells}
    lines = [
        f"Written by `{command}`; {cells[0].asked} samples a cell.",
        "",
        "| task | " + " | ".join(_images(count) for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for task in dict.fromkeys(cell.task for cell in cells):
        row = (f"{found[task, c]:.2f}" if (task, c) in found else "" for c in counts)
        lines.append(f"| {task} | " + " | ".join(row) + " |")
    weak = weak_cells(cells)
    named = ", ".join(
        f"{cell.task} with {_images(cell.images)} ({cell.accuracy:.2f})" for cell in weak
    )
    lines += ["", f"Under {JUDGE_THRESHOLD:.0%}, not used to judge compression: {named or 'none'}."]
    return "\n".join(lines)


def _images(count: int) -> str:
    return f"{count} image" + ("" if count == 1 else "s")


def write_table(page: Path, name: str, table: str) -> None:
    """Replace the table of this name in a page, or start a page with it."""
    start = TABLE_START.format(name=name)
    marked = f"{start}\n{table}\n{TABLE_END}"
    if not page.exists():
        page.write_text(marked + "\n", encoding="utf-8")
        return
    head, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, ended, tail = rest.partition(TABLE_END)
    if not found or not ended:
        raise UsageError(f"{page} has no such table to replace: add the lines {start} {TABLE_END}")
    page.write_text(head + marked + tail, encoding="utf-8")


def _parse_grid(text: str) -> tuple[int, int]:
    rows, separator, cols = text.partition("x")
    if not separator or not rows.isdigit() or not cols.isdigit():
        raise UsageError(f"--grid {text!r}: expected rows and columns such as 4x4")
    return int(rows), int(cols)


def _parse_counts(text: str) -> list[int]:
    if not all(piece.isdigit() for piece in text.split(",")):
        raise UsageError(f"--images {text!r}: expected numbers such as 1,4,8")
    return [int(piece) for piece in text.split(",")]


def _run(options: argparse.Namespace, command: str) -> None:
    torch.set_num_threads(options.threads)
    rows, cols = _parse_grid(options.grid)
    counts = _parse_counts(options.images)
    model, processor = load_model(options.checkpoint, dtype=options.dtype, device=options.device)

    def report(cell: Cell) -> None:
        sys.stderr.write(f"{cell.images:3d} images  {cell.task:7s} {cell.accuracy:.3f}\n")

    shapes = [SampleShape(count, rows, cols, labels=options.labels) for count in counts]
    cells = measure(model, processor, options.per_cell, shapes, report=report)
    table = markdown_table(cells, command)
    sys.stdout.write(table + "\n")
    if options.json:
        records = [{**vars(cell), "accuracy": cell.accuracy} for cell in cells]
        options.json.write_text(json.dumps({"command": command, "cells": records}, indent=1))
    if options.output:
        write_table(options.output, f"{options.grid} {options.labels}", table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.tinyvl.accuracy")
    parser.add_argument("--checkpoint", default="tinyvl", help="folder; default: the shipped one")
    parser.add_argument("--per-cell", type=int, default=24, help="samples of a task and count")
    parser.add_argument("--images", default="1,4,8,12,16", help="image counts, comma-separated")
    parser.add_argument("--grid", default="4x4", help="rows x columns of an image")
    parser.add_argument("--labels", choices=["consecutive", "random"], default="consecutive")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the cells to this file")
    parser.add_argument("-o", "--output", type=Path, help="page whose marked table is replaced")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    try:
        _run(options, " ".join([parser.prog, *given]))
    except HkvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
