"""The same samples through the full cache, hkvprof and baselines, interleaved sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hkvprof.errors import BudgetError, CompressionError, UsageError
from hkvprof.evaluate.calibration_prompts import calibration_prompts
from hkvprof.evaluate.contest import (
    MIN_TOKENS,
    Caches,
    ComparisonPlan,
    Contest,
    MethodAtBudget,
    ProfiledModel,
)
from hkvprof.evaluate.journal import Journal
from hkvprof.evaluate.outside import OutsideEngine, divergence, until
from hkvprof.evaluate.questions import AskedPrompt, Question, Stage, stepwise
from hkvprof.evaluate.records import FULL, OURS, REGIMES, Answer, TaskSet
from hkvprof.evaluate.replay import (
    Distance,
    Reference,
    answer,
    end_tokens,
    force,
    refer,
    refer_to,
    replay,
)
from hkvprof.samples.read import Sample

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def compare(
    profiled: ProfiledModel,
    tasks: TaskSet,
    comparison: ComparisonPlan,
    journal: Journal | None = None,
    track: Track | None = None,
    refused: dict[MethodAtBudget, str] | None = None,
    skip: Callable[[MethodAtBudget], bool] = lambda entry: False,
) -> list[Answer]:
    """Answers to every sample by every method, those already in the journal included.

    Entries are asked as long as `skip` does not say that no more of their answers are needed.
    A method that cannot meet a budget on a prompt has no answer to it; `refused` is filled with the
    reason. Raises BudgetError where hkvprof cannot and no `refused` is given, or can at no budget,
    CompressionError if a budget below 1 compressed nothing on any sample, and UsageError if no
    sample has a question in one of the regimes.
    """
    journal = journal or Journal(None, {})
    track = track or (lambda items, description, total: items)
    prompts = partial(calibration_prompts, profiled.model, profiled.processor, tasks)
    contest = Contest(profiled, comparison.seed, comparison.itemsize, prompts)
    for sample in track(tasks.samples, "answering", len(tasks.samples)):
        done = journal.done
        missing = [
            entry
            for entry in comparison.entries
            if (sample.id, entry.method, entry.budget) not in done and not skip(entry)
        ]
        if missing or (sample.id, FULL, "") not in done:
            one_sample = _Round(profiled, sample, tasks, comparison, contest)
            for entry, error in one_sample.play(missing, journal).items():
                if refused is None and entry.method == OURS:
                    raise error
                if refused is not None:
                    refused.setdefault(entry, f"{sample.id}: {error}")
            contest.forget()
    answers = comparison.select(journal.answers, tasks)
    _check(answers, comparison)
    if answers and not any(answer.method == OURS for answer in answers):
        raise BudgetError(_no_room(refused or {}))
    return answers


def _no_room(refused: dict[MethodAtBudget, str]) -> str:
    reasons = [reason for entry, reason in refused.items() if entry.method == OURS]
    return f"no budget can be met on any of the samples, first on {reasons[0]}"


@dataclass(frozen=True)
class _Asked:
    """A question after its prompt, and what the full cache says to it."""

    prompt: AskedPrompt
    question: Question
    reference: Reference
    truth: Reference | None
    """The same of what really follows, where that is known."""

    @property
    def first(self) -> torch.Tensor | None:
        """Logits that the compressed prompt ended with, where the reply follows it at once."""
        return None if self.question.lead else self.prompt.prefill.logits[0]

    @property
    def begin(self) -> int:
        """The first distribution that a method had a part in: not the prompt's own."""
        return 0 if self.question.lead else 1


@dataclass(frozen=True)
class _Said:
    """What a method says to a question, and what its cache held and took (as in `Answer`)."""

    text: str
    distance: Distance
    truth: Distance | None
    resident_bytes: int
    storage_bytes: int
    host_bytes: int
    dense_bytes: int
    compress_seconds: float
    hit_rate: float | None
    read_share: float = 0.0
    limit_share: float = 0.0
    runtime_kl: float | None = None


class _Round:
    """One sample asked of the full cache, and then of every method."""

    def __init__(
        self,
        profiled: ProfiledModel,
        sample: Sample,
        tasks: TaskSet,
        comparison: ComparisonPlan,
        contest: Contest,
    ) -> None:
        self.model, self.processor, self.sample = profiled.model, profiled.processor, sample
        self.tasks, self.comparison, self.contest = tasks, comparison, contest
        self.ends = end_tokens(self.model, self.processor)

    def play(
        self, entries: Sequence[MethodAtBudget], journal: Journal
    ) -> dict[MethodAtBudget, BudgetError]:
        """Answer with the full cache, then with every entry; each goes into the journal.

        Returns the entries that could not meet their budget, with the reason.
        """
        asked = self._refer()
        refused: dict[MethodAtBudget, BudgetError] = {}
        if not asked:
            return refused
        if (self.sample.id, FULL, "") not in journal.done:
            full = MethodAtBudget(FULL, "")
            journal.add([self._answer(one, full, self._full(one), len(asked)) for one in asked])
        for entry in entries:
            try:
                journal.add(self._compressed(entry, asked))
            except BudgetError as error:
                refused[entry] = error
        return refused

    def _refer(self) -> list[_Asked]:
        """The sample's questions in all regimes, each with the full cache's reply."""
        stage = Stage(self.model, self.processor, self.sample, self.tasks)
        asked: list[_Asked] = []
        first_reply: str | None = None
        for regime in self.comparison.regimes:
            if regime.startswith("later") and first_reply is None:
                known = [one for one in asked if one.prompt.regime == "inside"]
                first_reply = self._text(
                    (known or [self._ask_full(stage.inside(), 0)])[0].reference
                )
            prompt = self._prompt(stage, regime, first_reply or "")
            if prompt is not None:
                asked += [self._ask_full(prompt, i) for i in range(len(prompt.questions))]
        return asked

    @staticmethod
    def _prompt(stage: Stage, regime: str, first_reply: str) -> AskedPrompt | None:
        """The sample in one regime; None where it has no such question."""
        match regime:
            case "inside":
                return stage.inside()
            case "several":
                return stage.several()
            case "after" | "after_steps":
                prompt = stage.after()
            case _:
                prompt = stage.later(first_reply)
        return stepwise(prompt) if regime.endswith("_steps") else prompt

    def _ask_full(self, prompt: AskedPrompt, number: int) -> _Asked:
        question, prefill = prompt.questions[number], prompt.prefill
        first = None if question.lead else prefill.logits[0]
        prefill.restore(self.model)
        reference = refer(
            self.model, prefill.dense_cache(), first, replace(question.lead, stepwise=False),
            self.ends, self.comparison.steps, self.tasks.max_new_tokens,
        )  # fmt: skip
        truth = None
        if question.truth:
            tokens = question.truth[: self.comparison.steps]
            prefill.restore(self.model)
            truth = refer_to(self.model, prefill.dense_cache(), first, question.lead, tokens)
        return _Asked(prompt, question, reference, truth)

    def _text(self, reference: Reference) -> str:
        return self.processor.decode(list(reference.reply[: self.tasks.max_new_tokens]))

    def _full(self, one: _Asked) -> _Said:
        size = one.prompt.prefill.dense_bytes(self.comparison.itemsize)
        one.prompt.prefill.restore(self.model)
        with self.contest.whole(one.prompt.prefill) as cache:
            again, _ = replay(
                self.model, cache, one.first, one.question.lead, one.reference, stepwise=False
            )
        text, truth = self._text(one.reference), None
        if one.truth is not None:
            truth = one.truth.distance(one.truth.log_probs, one.begin)
        same = one.reference.distance(one.reference.log_probs, one.begin)
        return _Said(
            text, replace(same, kl=again.kl), truth, size, size, 0, size, compress_seconds=0.0,
            hit_rate=None,
        )  # fmt: skip

    def _compressed(self, entry: MethodAtBudget, asked: list[_Asked]) -> list[Answer]:
        """One method's answers; every prompt is compressed once. Raises BudgetError."""
        ours, say = entry, self._say
        if entry.method == self.comparison.engine:
            ours = replace(entry, method=OURS)
            say = partial(self._say_outside, self.contest.engines[entry.budget])
        answers = []
        for prompt in {id(one.prompt): one.prompt for one in asked}.values():
            with self.contest.open(ours, prompt.prefill) as caches:
                answers += [
                    self._answer(one, entry, say(caches, one), len(asked))
                    for one in asked
                    if one.prompt is prompt
                ]
        return answers

    def _say_outside(self, engine: OutsideEngine, caches: Caches, one: _Asked) -> _Said:
        """What an engine says; `caches` are hkvprof's under its plan, which it is compared with."""
        prompt, lead = one.prompt.prefill.ids[0].tolist(), one.question.lead
        forced = one.reference.forced.tolist()
        told = engine.force(prompt, lead.ids, forced)
        ours = force(self.model, caches(), one.first, lead, forced, stepwise=False)
        truth, left = None, one.reference.left_by(told.log_probs)
        if one.truth is not None:
            again = engine.force(prompt, lead.ids, one.truth.forced.tolist())
            truth = one.truth.distance(again.log_probs, one.begin)
        text, limit = self._text(one.reference), self.tasks.max_new_tokens
        if left is not None and left < limit:
            text = self.processor.decode(until(self.ends, engine.answer(prompt, lead.ids, limit)))
        return _Said(
            text, one.reference.distance(told.log_probs, one.begin), truth, told.resident_bytes,
            told.storage_bytes, 0, one.prompt.prefill.dense_bytes(), told.compress_seconds, None,
            runtime_kl=divergence(ours[one.begin :], told.log_probs[one.begin :]),
        )  # fmt: skip

    def _say(self, caches: Caches, one: _Asked) -> _Said:
        cache = caches()
        receipt, held = cache.receipt(), caches.count(cache)
        distance, left = replay(
            self.model, cache, one.first, one.question.lead, one.reference,
            stepwise=receipt.host_bytes > 0,
        )  # fmt: skip
        truth, after = None, cache.receipt()
        if one.truth is not None:
            stepped = receipt.host_bytes > 0
            again = caches()
            truth, _ = replay(self.model, again, one.first, one.question.lead, one.truth, stepped)
        text = self._text(one.reference)
        limit = self.tasks.max_new_tokens
        if left is not None and left < limit:
            ids = answer(self.model, caches(), one.first, one.question.lead, self.ends, limit)
            text = self.processor.decode(list(ids))
        return _Said(
            text,
            distance,
            truth,
            held.resident,
            held.storage,
            held.host,
            held.dense,
            compress_seconds=caches.seconds + receipt.compression_seconds,
            hit_rate=after.hit_rate,
            read_share=after.read_share,
            limit_share=after.limit_share,
        )

    def _answer(self, one: _Asked, entry: MethodAtBudget, said: _Said, questions: int) -> Answer:
        gold = one.question.gold
        return Answer(
            sample=self.sample.id,
            task=one.question.task,
            regime=one.prompt.regime,
            turn=one.question.turn,
            method=entry.method,
            budget=entry.budget,
            text=said.text,
            expected=gold.references[0] if gold else "",
            metric=gold.metric.name if gold else "",
            score=gold.score(said.text) if gold else None,
            kl=said.distance.kl,
            agreement=said.distance.agreement,
            nll=said.distance.nll,
            steps=said.distance.rows,
            true_kl=None if said.truth is None else said.truth.kl,
            true_nll=None if said.truth is None else said.truth.nll,
            prompt_tokens=one.prompt.prefill.tokens,
            resident_bytes=said.resident_bytes,
            storage_bytes=said.storage_bytes,
            host_bytes=said.host_bytes,
            dense_bytes=said.dense_bytes,
            compress_seconds=said.compress_seconds,
            hit_rate=said.hit_rate,
            questions=questions,
            read_share=said.read_share,
            limit_share=said.limit_share,
            runtime_kl=said.runtime_kl,
        )


def _check(answers: Sequence[Answer], comparison: ComparisonPlan) -> None:
    """What claims to compress must have done so, and every regime must have been asked."""
    for regime in comparison.regimes:
        if not any(a.regime == regime for a in answers):
            raise UsageError(
                f"no sample has a question in the regime {regime!r} ({REGIMES[regime]}): leave "
                "it out, or use samples whose question ends the prompt and that have follow-ups"
            )
    for entry in comparison.entries:
        given = [a for a in answers if (a.method, a.budget) == (entry.method, entry.budget)]
        if not entry.is_whole and given and all(a.resident_bytes >= a.dense_bytes for a in given):
            raise CompressionError(
                f"{entry.method} at budget {entry.budget} compressed nothing on any of the "
                f"samples: prompts may be shorter than {MIN_TOKENS} tokens, or the budget may hold "
                "them whole"
            )
