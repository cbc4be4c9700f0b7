"""The table of a comparison: mean scores by task, and the metric where there are several."""

from __future__ import annotations

import io

from rich.console import Console

from hkvprof.evaluate.compare import Answer
from hkvprof.report.comparison import comparison_table


def answer(task: str, metric: str, score: float, method: str = "full") -> Answer:
    return Answer(
        sample="s", task=task, turn=0, method=method, text="", expected="", metric=metric,
        score=score, prompt_tokens=9, decode_seconds=0.5, decode_steps=5, resident_bytes=1024,
        storage_bytes=1024, host_bytes=0, dense_bytes=1024, end_share=1.0, hit_rate=None,
    )  # fmt: skip


def rendered(answers: list[Answer]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(comparison_table(answers))
    return stream.getvalue()


def test_scores_are_means_by_task() -> None:
    text = rendered([answer("ocr", "anls", 1.0), answer("ocr", "anls", 0.5)])
    row = next(line for line in text.splitlines() if "ocr (n=2)" in line)
    assert "75%" in row
    assert "score, question in the prompt" in text
    assert "anls" not in text


def test_metrics_are_named_where_they_differ() -> None:
    text = rendered([answer("ocr", "anls", 1.0), answer("caption", "rouge_l", 0.25)])
    assert "ocr (anls, n=1)" in text
    assert "caption (rouge_l, n=1)" in text
