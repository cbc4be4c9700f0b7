"""Full cache against compressed cache on the same samples, interleaved sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers.cache_utils import DynamicCache

from hkvprof.artifact import Profile
from hkvprof.errors import CompressionError
from hkvprof.evaluate.converse import Reply, Sizes, converse
from hkvprof.evaluate.taskset import TaskSet
from hkvprof.models.adapter import view_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.policy.budget import Budget
from hkvprof.profile.samples import Sample
from hkvprof.runtime import apply, measure_storage

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
MIN_TOKENS = 64
"""Fewer than `apply` asks for: here it is quality that counts, not time."""
FULL = "full"


@dataclass(frozen=True)
class Answer:
    """One reply under one method.

    `turn` 0 is the question inside the prompt, later turns ask about the compressed context. Bytes
    are those of the cache at the reply's first token (the prompt is compressed, nothing generated);
    `storage_bytes` sums the cache's actual tensors (resident), independent of the receipt's
    `resident_bytes`. `score` lies between 0 and 1 and is what `metric` says of `text`; `expected`
    is the first of the correct answers. `end_share` is resident over dense bytes when the
    conversation has ended.
    """

    sample: str
    task: str
    turn: int
    method: str
    text: str
    expected: str
    metric: str
    score: float
    prompt_tokens: int
    decode_seconds: float
    decode_steps: int
    resident_bytes: int
    storage_bytes: int
    host_bytes: int
    dense_bytes: int
    end_share: float
    hit_rate: float | None


@dataclass(frozen=True)
class MethodSummary:
    """Means over all answers of one method; shares are resident over dense bytes."""

    method: str
    answers: int
    score: float
    score_first: float
    score_later: float | None
    worst_task: str
    worst_ratio: float
    resident_bytes: float
    host_bytes: float
    share: float
    storage_share: float
    end_share: float
    decode_ms: float
    hit_rate: float | None


def compare(
    model: Any,
    processor: ChatProcessor,
    profile: Profile,
    tasks: TaskSet,
    budgets: Sequence[float | int | str],
    track: Track | None = None,
) -> list[Answer]:
    """Answer every sample with the full cache and at every budget, one after the other.

    Raises CompressionError if a budget below 1 compressed nothing on any sample.
    """
    track = track or (lambda items, description, total: items)
    answers: list[Answer] = []
    for sample in track(tasks.samples, "answering", len(tasks.samples)):
        answers += _answer_full(model, processor, sample, tasks)
        for budget in budgets:
            answers += _answer_compressed(model, processor, profile, sample, tasks, budget)
    _require_compression(answers, budgets)
    return answers


def _answer_full(
    model: Any, processor: ChatProcessor, sample: Sample, tasks: TaskSet
) -> list[Answer]:
    cache = DynamicCache(config=view_model(model).text_config)

    def look() -> Sizes:
        held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
        size = sum(tensor.untyped_storage().nbytes() for tensor in held)
        return Sizes(resident=size, storage=size, dense=size)

    replies = converse(model, processor, sample, cache, tasks.max_new_tokens, look)
    return _answers(replies, sample, tasks, FULL, end_share=1.0, hit_rate=None)


def _answer_compressed(
    model: Any,
    processor: ChatProcessor,
    profile: Profile,
    sample: Sample,
    tasks: TaskSet,
    budget: float | int | str,
) -> list[Answer]:
    with apply(model, profile, budget=budget, min_tokens=MIN_TOKENS) as handle:
        cache = handle.new_cache()

        def look() -> Sizes:
            now = cache.receipt()
            storage, _ = measure_storage(cache)
            return Sizes(now.resident_bytes, storage, now.host_bytes, now.dense_bytes)

        replies = converse(model, processor, sample, cache, tasks.max_new_tokens, look)
        end = cache.receipt()
    return _answers(
        replies,
        sample,
        tasks,
        method_name(budget),
        end_share=end.resident_share,
        hit_rate=end.hit_rate,
    )


def _answers(
    replies: list[Reply],
    sample: Sample,
    tasks: TaskSet,
    method: str,
    end_share: float,
    hit_rate: float | None,
) -> list[Answer]:
    gold = [tasks.gold_of(sample, turn) for turn in range(len(replies))]
    return [
        Answer(
            sample=sample.id,
            task=sample.task if turn == 0 else "later question",
            turn=turn,
            method=method,
            metric=gold[turn].metric.name,
            score=gold[turn].score(reply.text),
            text=reply.text,
            expected=reply.expected,
            prompt_tokens=reply.prompt_tokens,
            decode_seconds=reply.decode_seconds,
            decode_steps=reply.decode_steps,
            resident_bytes=reply.sizes.resident,
            storage_bytes=reply.sizes.storage,
            host_bytes=reply.sizes.host,
            dense_bytes=reply.sizes.dense,
            end_share=end_share,
            hit_rate=hit_rate,
        )
        for turn, reply in enumerate(replies)
    ]


def method_name(budget: float | int | str) -> str:
    """How a budget is called in tables."""
    return f"budget {budget}"


def _require_compression(answers: list[Answer], budgets: Sequence[float | int | str]) -> None:
    for budget in budgets:
        mine = [a for a in answers if a.method == method_name(budget)]
        whole = Budget.parse(budget).share == 1
        if not whole and all(a.resident_bytes >= a.dense_bytes for a in mine):
            raise CompressionError(
                f"budget {budget} compressed nothing on any of the samples: prompts may be shorter "
                f"than {MIN_TOKENS} tokens, or the budget may hold them whole"
            )


def summarise(answers: Sequence[Answer]) -> list[MethodSummary]:
    """One summary per method, in the order of first appearance."""
    methods = list(dict.fromkeys(answer.method for answer in answers))
    reference = task_scores([a for a in answers if a.method == FULL])
    return [_summary(method, [a for a in answers if a.method == method], reference)
            for method in methods]  # fmt: skip


def task_scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean score by task, in the order of first appearance."""
    names = dict.fromkeys(answer.task for answer in answers)
    return {name: fmean(a.score for a in answers if a.task == name) for name in names}


def _summary(method: str, answers: list[Answer], reference: dict[str, float]) -> MethodSummary:
    scores = task_scores(answers)
    ratios = {t: a / reference[t] for t, a in scores.items() if reference.get(t)}
    worst = min(ratios, key=lambda task: ratios[task], default="")
    first = [a for a in answers if a.turn == 0]
    later = [a for a in answers if a.turn > 0]
    hits = [a.hit_rate for a in first if a.hit_rate is not None]
    steps = sum(a.decode_steps for a in answers)
    return MethodSummary(
        method=method,
        answers=len(answers),
        score=fmean(a.score for a in answers),
        score_first=fmean(a.score for a in first),
        score_later=fmean(a.score for a in later) if later else None,
        worst_task=worst,
        worst_ratio=ratios.get(worst, 0.0),
        resident_bytes=fmean(a.resident_bytes for a in first),
        host_bytes=fmean(a.host_bytes for a in first),
        share=sum(a.resident_bytes for a in first) / sum(a.dense_bytes for a in first),
        storage_share=sum(a.storage_bytes for a in first) / sum(a.dense_bytes for a in first),
        end_share=fmean(a.end_share for a in first),
        decode_ms=1000 * sum(a.decode_seconds for a in answers) / max(steps, 1),
        hit_rate=fmean(hits) if hits else None,
    )
