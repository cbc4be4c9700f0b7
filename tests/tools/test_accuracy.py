"""The accuracy command: tables, pages, and the shipped checkpoint on a few samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hkvprof.errors import UsageError
from hkvprof.models.load import load_model
from hkvprof.testbed.generator import make_sample
from tools.tinyvl import accuracy
from tools.tinyvl.accuracy import Cell, markdown_table, same_reply, weak_cells, write_table

CELLS = [Cell("ocr", 1, 4, 4), Cell("ocr", 8, 3, 4), Cell("top", 8, 2, 4)]


def test_replies_agree_but_for_white_space() -> None:
    assert same_reply("red disc  none", "red disc none")
    assert not same_reply("red disc", "red star")


def test_table_has_a_row_per_task_and_names_weak_ones() -> None:
    table = markdown_table(CELLS, "the command")
    assert "| ocr | 1.00 | 0.75 |" in table
    assert "| top |  | 0.50 |" in table
    assert "`the command`" in table
    assert table.endswith("top with 8 images (0.50).")
    assert weak_cells(CELLS) == [CELLS[2]]


def test_page_keeps_what_surrounds_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_table(page, "4x4", "one")
    page.write_text("before\n" + page.read_text() + "after\n")
    write_table(page, "4x4", "two")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "two" in text
    assert "one" not in text


def test_a_page_without_table_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine")
    with pytest.raises(UsageError, match="no such table"):
        write_table(page, "4x4", "new")
    assert page.read_text() == "mine"


def test_shipped_checkpoint_answers() -> None:
    torch.set_num_threads(1)
    model, processor = load_model("tinyvl", dtype="float32", device="cpu")
    samples = [
        make_sample(task, seed, images=images, split="heldout")
        for task in ("ocr", "list", "cell", "find", "kv", "maj")
        for seed, images in enumerate((1, 3, 6))
    ]
    replies = accuracy.greedy_replies(model, processor, samples, batch_size=6)
    right = [same_reply(r, s.reply or "") for r, s in zip(replies, samples, strict=True)]
    assert sum(right) >= len(samples) - 1


def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    options = ["--per-cell", "1", "--images", "1", "--grid", "2x4"]
    assert accuracy.main([*options, "--json", str(figures), "-o", str(page)]) == 0
    assert "| kv |" in capsys.readouterr().out
    assert "| kv |" in page.read_text()
    assert len(json.loads(figures.read_text())["cells"]) == 10
    assert accuracy.main(["--grid", "four"]) == 2
    assert "4x4" in capsys.readouterr().err
