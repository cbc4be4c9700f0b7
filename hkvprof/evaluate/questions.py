"""A sample as it is asked: what is compressed, and which tokens follow before the reply begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hkvprof.calibration.continuation import opening_of_turn
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.evaluate.records import Gold, TaskSet
from hkvprof.evaluate.replay import Lead
from hkvprof.heads import Modality
from hkvprof.models.processing import ChatProcessor, Encoded
from hkvprof.samples.read import Sample, open_images

_OTHER_QUESTIONS = ("?", "Why", "1")
"""Where encodings of these differ from the sample's own, its question begins."""
_SEVERAL = "Answer these questions one by one:"
_ANSWER = "Answer to question {}:"
_LEAST_CONTEXT = 0.5
"""Share of the prompt that must come before the question, else there is little to compress."""


@dataclass(frozen=True)
class Question:
    """`lead` is fed after the compressed prompt; empty when the prompt ends with the question.

    `gold` is None where nothing says what is correct; `truth` are the tokens that really follow.
    """

    turn: int
    task: str
    lead: Lead
    gold: Gold | None
    truth: tuple[int, ...] = ()


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt that is compressed, and the questions that are asked of it, each on its own."""

    regime: str
    prefill: Prefill
    questions: tuple[Question, ...]


class Stage:
    """One sample, opened and run through the model once."""

    def __init__(self, model: Any, processor: ChatProcessor, sample: Sample, tasks: TaskSet):
        self.model, self.processor, self.sample, self.tasks = model, processor, sample, tasks
        self.opened = replace(sample, messages=tuple(open_images(sample)))
        self.encoded = processor.encode([self.opened.messages])
        self.prefill = capture(model, self.encoded)

    def inside(self) -> AskedPrompt:
        """The question is the end of what is compressed."""
        question = Question(0, self.sample.task, Lead(), self._gold(0), self._truth())
        return AskedPrompt("inside", self.prefill, (question,))

    def after(self) -> AskedPrompt | None:
        """The context is compressed before any question is known; each question follows it.

        The question is the text that ends the prompt; None where none does.
        """
        if _last_text(self.opened.messages[-1]["content"]) is None:
            return None
        own = self._ids(self.encoded)
        turns = [turn.question for turn in self.sample.followups]
        asked = [own] + [self._ids(self._encode_with(text)) for text in turns]
        others = [self._ids(self._encode_with(text)) for text in _OTHER_QUESTIONS]
        split = min(_common(own, ids) for ids in [*asked[1:], *others])
        late_vision = (self.encoded.modality[0, split:] != Modality.TEXT) & (
            self.encoded.modality[0, split:] != Modality.CONTEXT
        )
        if split < _LEAST_CONTEXT * len(own) or bool(late_vision.any()):
            return None
        questions = tuple(
            Question(
                turn,
                self.sample.task,
                Lead(tuple(ids[split:])),
                self._gold(turn),
                () if turn else self._truth(),
            )
            for turn, ids in enumerate(asked)
        )
        return AskedPrompt("after", self.prefill.first(split), questions)

    def later(self, first_reply: str) -> AskedPrompt | None:
        """A follow-up, after the question inside the prompt has been answered."""
        questions = []
        for number, turn in enumerate(self.sample.followups, start=1):
            alone = replace(self.opened, followups=(turn,))
            lead = opening_of_turn(self.processor, alone, [first_reply])
            told = Lead(tuple(lead))
            questions.append(Question(number, self.sample.task, told, self._gold(number)))
        return AskedPrompt("later", self.prefill, tuple(questions)) if questions else None

    def several(self) -> AskedPrompt | None:
        """All questions at the end of one compressed prompt, each answered after its number.

        None where a sample has one question, or does not end with text.
        """
        last = self.opened.messages[-1]["content"]
        asked = [_last_text(last), *(turn.question for turn in self.sample.followups)]
        if asked[0] is None or len(asked) < 2:
            return None
        listed = [f"{number}. {text}" for number, text in enumerate(asked, start=1)]
        prefill = capture(self.model, self._encode_with("\n".join([_SEVERAL, *listed])))
        leads = [self.processor.encode_text(_ANSWER.format(n + 1)) for n in range(len(asked))]
        questions = tuple(
            Question(turn, self.sample.task, Lead(tuple(lead)), self._gold(turn))
            for turn, lead in enumerate(leads)
        )
        return AskedPrompt("several", prefill, questions)

    def _truth(self) -> tuple[int, ...]:
        """Tokens of what really follows the sample's text; none where it is a question."""
        return tuple(self.processor.encode_text(self.tasks.truth.get(self.sample.id, "")))

    def _gold(self, turn: int) -> Gold | None:
        known = self.sample.reply if turn == 0 else self.sample.followups[turn - 1].reply
        has_gold = turn == 0 and self.sample.id in self.tasks.gold
        return self.tasks.gold_of(self.sample, turn) if known or has_gold else None

    def _encode_with(self, question: str) -> Encoded:
        """The prompt with another question in place of its last text."""
        *before, last = self.opened.messages
        content = last["content"]
        asked: Any = question
        if not isinstance(content, str):
            asked = [*content[:-1], {**content[-1], "text": question}]
        return self.processor.encode([[*before, {**last, "content": asked}]])

    @staticmethod
    def _ids(encoded: Encoded) -> list[int]:
        return [int(token) for token in encoded.inputs["input_ids"][0]]


def stepwise(asked: AskedPrompt | None) -> AskedPrompt | None:
    """The same questions, each fed token by token."""
    if asked is None:
        return None
    questions = tuple(
        replace(question, lead=replace(question.lead, stepwise=True), truth=())
        for question in asked.questions
    )
    return AskedPrompt(f"{asked.regime}_steps", asked.prefill, questions)


def _last_text(content: Any) -> str | None:
    """The text that ends a message; None where something else does."""
    if isinstance(content, str):
        return content
    return str(content[-1]["text"]) if content[-1]["type"] == "text" else None


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
