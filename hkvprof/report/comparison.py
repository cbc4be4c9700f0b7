"""The table of a comparison, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hkvprof.evaluate.compare import FULL, Answer, MethodSummary, summarise, task_scores


def comparison_table(answers: Sequence[Answer]) -> Table:
    """Mean score per task, then bytes and time, one column per method."""
    summaries = summarise(answers)
    counts = {s.method: s.answers for s in summaries}
    table = Table(title=f"{counts[FULL]} answers per method, greedy, same samples")
    table.add_column("")
    for summary in summaries:
        table.add_column(
            "full cache" if summary.method == FULL else summary.method, justify="right"
        )
    by_method = {
        s.method: task_scores([a for a in answers if a.method == s.method]) for s in summaries
    }
    mixed = len({a.metric for a in answers}) > 1
    for task in by_method[FULL]:
        metrics = [a.metric for a in answers if a.task == task and a.method == FULL]
        named = "".join(f"{metric}, " for metric in dict.fromkeys(metrics) if mixed)
        table.add_row(
            f"{task} ({named}n={len(metrics)})",
            *(f"{by_method[s.method][task]:.0%}" for s in summaries),
        )
    table.add_section()
    for label, cells in _totals(summaries):
        table.add_row(label, *cells)
    return table


def _totals(summaries: Sequence[MethodSummary]) -> list[tuple[str, list[str]]]:
    kib = 1024
    return [
        ("score, question in the prompt", [f"{s.score_first:.1%}" for s in summaries]),
        (
            "score, later question",
            ["-" if s.score_later is None else f"{s.score_later:.1%}" for s in summaries],
        ),
        (
            "resident KV after the prompt, KiB",
            [f"{s.resident_bytes / kib:,.0f}" for s in summaries],
        ),
        ("  share of dense, by receipt", [f"{s.share:.1%}" for s in summaries]),
        ("  share of dense, by tensors", [f"{s.storage_share:.1%}" for s in summaries]),
        ("  share after all replies", [f"{s.end_share:.1%}" for s in summaries]),
        ("KV on the host, KiB", [f"{s.host_bytes / kib:,.0f}" for s in summaries]),
        ("decode, ms per token", [f"{s.decode_ms:.1f}" for s in summaries]),
        (
            "hit rate of the hot buffers",
            ["-" if s.hit_rate is None else f"{s.hit_rate:.0%}" for s in summaries],
        ),
    ]


def next_steps(model: str, profile: str) -> list[str]:
    """Lines that tell what a user can do with what was just made."""
    return [
        "Next, in your own code:",
        "    import hkvprof, hkvprof.runtime",
        f'    model, processor = hkvprof.load_model("{model}")',
        f'    with hkvprof.runtime.apply(model, "{profile}", budget=0.10) as handle:',
        "        model.generate(...)",
        "        print(handle.receipt())",
        "and for your own model: hkvprof calibrate --model ORG/NAME --data YOUR_SAMPLES",
    ]
