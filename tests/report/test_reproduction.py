"""The report of a reproduction: figures of here beside published ones, and what is not complete."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from hkvprof.evaluate.reproduce.published import DIFFERENCES, IMAGES_MEAN
from hkvprof.evaluate.reproduce.scoring import BenchmarkScore, images_mean
from hkvprof.report.reproduction import notes, reproduction_page, reproduction_table

ALFRED = BenchmarkScore("MileBench/ALFRED", "hybridkv", "0.10", 40.0, 200, 200, 0.1)
TQA = BenchmarkScore("MileBench/TQA", "hybridkv", "0.10", 80.0, 100, 200, 0.1)
VATEX = BenchmarkScore("VATEX", "full", "", 0.25, 6000, 6000, 1.0)
JUDGED = BenchmarkScore("Video-ChatGPT", "full", "", None, 3000, 3000, 1.0)


def test_the_mean_is_over_tasks_whatever_their_size() -> None:
    (mean,) = images_mean([ALFRED, TQA, VATEX])
    assert mean == BenchmarkScore(IMAGES_MEAN, "hybridkv", "0.10", 60.0, 300, 400, 0.1)
    only = replace(ALFRED, method="snapkv")
    assert images_mean([ALFRED, TQA, only]) == [mean], "one task of two has no mean"


def test_published_figures_stand_beside_those_of_the_papers_model() -> None:
    scores = [*images_mean([ALFRED, TQA]), ALFRED, TQA, VATEX, JUDGED]
    page = reproduction_page(scores, "Qwen/Qwen2.5-VL-7B-Instruct", "m, own instructions")
    assert "| hybridkv | 0.10 | 60.00 / 66.68 | - / 0.3399 | - / 33.86 | - / 2.85 |" in page
    assert "| full | - | - / 67.53 | 0.2500 / 0.3321 |" in page
    assert "| MileBench/TQA | hybridkv | 0.10 | 80.00 | 100/200 | 10.0% |" in page
    assert "not complete yet: MileBench/TQA;" in page
    assert "answered, not judged: run again with --judge URL" in page
    assert "judge: m, own instructions" in page
    assert all(line in page for line in DIFFERENCES)


def test_another_model_has_no_published_figures() -> None:
    page = reproduction_page([VATEX], "qwen2.5-vl-3b", "")
    assert "67.53" not in page
    assert "| full | - | - | 0.2500 |" in page
    assert "another model than this one" in " ".join(notes([VATEX], "qwen2.5-vl-3b"))


def test_the_table_fits_eighty_columns() -> None:
    console = Console(width=80, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(reproduction_table([ALFRED, VATEX], "qwen2.5-vl-7b"))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("0.2500 / 0.3321" in line for line in lines)
