"""The same samples through the full cache, hkvprof and baselines, interleaved sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hkvprof.errors import BudgetError, CompressionError, UsageError
from hkvprof.evaluate.contest import MIN_TOKENS, Caches, Contest
from hkvprof.evaluate.journal import Journal
from hkvprof.evaluate.plan import Entry, Plan
from hkvprof.evaluate.questions import Question, Scene, Stage
from hkvprof.evaluate.records import FULL, OURS, REGIMES, Answer
from hkvprof.evaluate.replay import Distance, Reference, answer, end_tokens, refer, replay
from hkvprof.evaluate.taskset import TaskSet
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.record import Profile
from hkvprof.runtime import measure_storage
from hkvprof.samples.read import Sample

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def compare(
    model: Any,
    processor: ChatProcessor,
    profile: Profile,
    tasks: TaskSet,
    plan: Plan,
    journal: Journal | None = None,
    track: Track | None = None,
    refused: dict[Entry, str] | None = None,
    skip: Callable[[Entry], bool] = lambda entry: False,
) -> list[Answer]:
    """Answers to every sample by every method, those already in the journal included.

    Entries are asked as long as `skip` does not say that no more of their answers are needed.
    A baseline whose rule cannot meet a budget on a prompt has no answer to it; `refused` is filled
    with the reason. hkvprof's own failure is an error. Raises CompressionError if a budget below 1
    compressed nothing on any sample, and UsageError if no sample has a question in one of the
    regimes.
    """
    journal = journal or Journal(None, {})
    track = track or (lambda items, description, total: items)
    contest = Contest(model, profile, plan.seed)
    for sample in track(tasks.samples, "answering", len(tasks.samples)):
        done = journal.done
        missing = [
            entry
            for entry in plan.entries
            if (sample.id, entry.method, entry.budget) not in done and not skip(entry)
        ]
        if missing or (sample.id, FULL, "") not in done:
            now = _Round(model, processor, sample, tasks, plan, contest)
            for entry, reason in now.play(missing, journal).items():
                if refused is not None:
                    refused.setdefault(entry, f"{sample.id}: {reason}")
            contest.forget()
    answers = plan.select(journal.answers, tasks)
    _check(answers, plan)
    return answers


@dataclass(frozen=True)
class _Asked:
    """A question, the prompt that is compressed for it, and the full cache's reply to it."""

    scene: Scene
    question: Question
    reference: Reference

    @property
    def first(self) -> torch.Tensor | None:
        """Logits that the compressed prompt ended with, where the reply follows it at once."""
        return None if self.question.lead else self.scene.prefill.logits[0]


class _Round:
    """One sample asked of the full cache, and then of every method."""

    def __init__(
        self,
        model: Any,
        processor: ChatProcessor,
        sample: Sample,
        tasks: TaskSet,
        plan: Plan,
        contest: Contest,
    ) -> None:
        self.model, self.processor, self.sample = model, processor, sample
        self.tasks, self.plan, self.contest = tasks, plan, contest
        self.ends = end_tokens(model, processor)

    def play(self, entries: Sequence[Entry], journal: Journal) -> dict[Entry, str]:
        """Answer with the full cache, then with every entry; each goes into the journal.

        Returns the baselines that could not meet their budget, with the reason.
        """
        asked = self._refer()
        refused: dict[Entry, str] = {}
        if not asked:
            return refused
        if (self.sample.id, FULL, "") not in journal.done:
            journal.add([self._full(one, len(asked)) for one in asked])
        scenes = list({id(one.scene): one.scene for one in asked}.values())
        for entry in entries:
            try:
                made = []
                for scene in scenes:
                    mine = [one for one in asked if one.scene is scene]
                    with self.contest.open(entry, scene.prefill) as caches:
                        made += [self._compressed(entry, caches, one, len(asked)) for one in mine]
                journal.add(made)
            except BudgetError as error:
                if entry.method == OURS:
                    raise
                refused[entry] = str(error)
        return refused

    def _refer(self) -> list[_Asked]:
        """The sample's questions in all regimes, each with the full cache's reply."""
        stage = Stage(self.model, self.processor, self.sample, self.tasks)
        asked: list[_Asked] = []
        first_reply: str | None = None
        for regime in self.plan.regimes:
            if regime == "inside":
                scene: Scene | None = stage.inside()
            elif regime == "after":
                scene = stage.after()
            else:
                if first_reply is None:
                    known = [one for one in asked if one.scene.regime == "inside"]
                    first_reply = self._text(
                        (known or [self._ask_full(stage.inside(), 0)])[0].reference
                    )
                scene = stage.later(first_reply)
            if scene is not None:
                asked += [self._ask_full(scene, i) for i in range(len(scene.questions))]
        return asked

    def _ask_full(self, scene: Scene, number: int) -> _Asked:
        question = scene.questions[number]
        prefill = scene.prefill
        prefill.restore(self.model)
        reference = refer(
            self.model,
            prefill.dense_cache(),
            None if question.lead else prefill.logits[0],
            question.lead,
            self.ends,
            self.plan.steps,
            self.tasks.max_new_tokens,
        )
        return _Asked(scene, question, reference)

    def _text(self, reference: Reference) -> str:
        return self.processor.decode(list(reference.reply[: self.tasks.max_new_tokens]))

    def _full(self, one: _Asked, questions: int) -> Answer:
        calls = one.scene.prefill.calls
        size = sum(call.key.nbytes + call.value.nbytes for call in calls)
        distance = one.reference.distance(one.reference.log_probs, 0 if one.question.lead else 1)
        return self._answer(
            one, Entry(FULL, ""), self._text(one.reference), distance, questions,
            sizes=(size, size, 0, size), seconds=0.0, hit_rate=None,
        )  # fmt: skip

    def _compressed(self, entry: Entry, caches: Caches, one: _Asked, questions: int) -> Answer:
        cache = caches()
        receipt = cache.receipt()
        storage, _ = measure_storage(cache)
        distance, left = replay(
            self.model, cache, one.first, one.question.lead, one.reference,
            stepwise=receipt.host_bytes > 0,
        )  # fmt: skip
        text = self._text(one.reference)
        limit = self.tasks.max_new_tokens
        if left is not None and left < limit:
            ids = answer(self.model, caches(), one.first, one.question.lead, self.ends, limit)
            text = self.processor.decode(list(ids))
        sizes = (receipt.resident_bytes, storage, receipt.host_bytes, receipt.dense_bytes)
        seconds = caches.seconds + receipt.compression_seconds
        return self._answer(
            one, entry, text, distance, questions, sizes, seconds, cache.receipt().hit_rate
        )

    def _answer(
        self,
        one: _Asked,
        entry: Entry,
        text: str,
        distance: Distance,
        questions: int,
        sizes: tuple[int, int, int, int],
        seconds: float,
        hit_rate: float | None,
    ) -> Answer:
        gold = one.question.gold
        resident, storage, host, dense = sizes
        return Answer(
            sample=self.sample.id,
            task=one.question.task,
            regime=one.scene.regime,
            turn=one.question.turn,
            method=entry.method,
            budget=entry.budget,
            text=text,
            expected=gold.references[0] if gold else "",
            metric=gold.metric.name if gold else "",
            score=gold.score(text) if gold else None,
            kl=distance.kl,
            agreement=distance.agreement,
            nll=distance.nll,
            steps=distance.rows,
            prompt_tokens=one.scene.prefill.tokens,
            resident_bytes=resident,
            storage_bytes=storage,
            host_bytes=host,
            dense_bytes=dense,
            compress_seconds=seconds,
            hit_rate=hit_rate,
            questions=questions,
        )


def _check(answers: Sequence[Answer], plan: Plan) -> None:
    """What claims to compress must have done so, and every regime must have been asked."""
    for regime in plan.regimes:
        if not any(a.regime == regime for a in answers):
            raise UsageError(
                f"no sample has a question in the regime {regime!r} ({REGIMES[regime]}): leave "
                "it out, or use samples whose question ends the prompt and that have follow-ups"
            )
    for entry in plan.entries:
        mine = [a for a in answers if (a.method, a.budget) == (entry.method, entry.budget)]
        if not entry.is_whole and mine and all(a.resident_bytes >= a.dense_bytes for a in mine):
            raise CompressionError(
                f"{entry.method} at budget {entry.budget} compressed nothing on any of the "
                f"samples: prompts may be shorter than {MIN_TOKENS} tokens, or the budget may hold "
                "them whole"
            )
