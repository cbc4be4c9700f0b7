"""Long-text tasks on real prose: a context that can be compressed, a question, a short answer.

For text-only models the long context plays the part of the vision tokens and the question that of
the text. The prose is the frozen Python Language Reference (`make_prose`); calibration and
held-out samples draw on different topics of it and share no paragraph.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, count, pairwise
from pathlib import Path
from random import Random

from hkvprof.errors import UsageError
from hkvprof.evaluate.make_prose import split_sentences
from hkvprof.evaluate.needles import FOLLOWUP_KINDS, NEEDLES, PARTS, Needle, inscription
from hkvprof.profile.samples import Sample, Turn

CountTokens = Callable[[str], int]

PROSE = Path(__file__).parent / "data" / "prose.json.gz"
SPLITS = ("calibration", "heldout")
TASKS = (*NEEDLES, "prose_qa", "copy", "continuation")
JOINT = "\n\n"  # between paragraphs, and between context and question
MIN_TOKENS = 600  # shorter ones may hold no clear pair of sentences to ask about
MAX_FOLLOWUPS = len(FOLLOWUP_KINDS) - 1
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it modulo 1 spread evenly, for any count


def count_words(text: str) -> int:
    """Number of words between white space: a token counter for when no tokenizer is at hand."""
    return len(text.split())


@cache
def topics() -> dict[str, tuple[str, ...]]:
    """The frozen corpus: topic name -> paragraphs."""
    with gzip.open(PROSE, "rt", encoding="utf-8") as file:
        return {name: tuple(texts) for name, texts in json.load(file)["topics"].items()}


def split_of(topic: str) -> str:
    """The split that a topic belongs to, from a hash of its name."""
    return SPLITS[1 - hashlib.sha256(topic.encode()).digest()[0] % 2]


@cache
def paragraphs(split: str) -> tuple[str, ...]:
    """All paragraphs of one split, in the order of topic names."""
    if split not in SPLITS:
        raise UsageError(f"expected a split among {', '.join(SPLITS)}; found '{split}'.")
    return tuple(text for name in topics() if split_of(name) == split for text in topics()[name])


def make_sample(
    task: str,
    index: int,
    tokens: int = 2500,
    split: str = "calibration",
    followups: int = 0,
    count_tokens: CountTokens = count_words,
) -> Sample:
    """One sample, the same for the same arguments.

    The user message is context + blank line + question and counts `tokens` within 3%. `reply` is
    the shortest correct answer; judge with `is_correct`. `continuation` has no reply: judge it by
    its distance to the full cache. Each of the 0 to 3 `followups` asks for another fact planted
    in the same context. Needles lie evenly spread over the context, also from index to index.
    """
    _check(task, tokens, followups)
    name = f"longtext {split} {task} {index}"
    seeds = chain([name], (f"{name} {attempt}" for attempt in count(1)))
    samples = (
        _draw(task, index, tokens, split, followups, count_tokens, Random(seed)) for seed in seeds
    )
    return next(sample for sample in samples if _is_clear(sample))


def _draw(
    task: str,
    index: int,
    tokens: int,
    split: str,
    followups: int,
    count_tokens: CountTokens,
    rng: Random,
) -> Sample:
    """A sample in which, by accident, two of the drawn facts may look alike."""
    prose: Sequence[str] = paragraphs(split)
    start = rng.randrange(len(prose))
    prose = [*prose[start:], *prose[:start]]
    extra = [NEEDLES[kind](rng) for kind in _followup_kinds(task, index, followups)]
    first, prose = _first_needle(task, rng, prose, int(tokens * 0.8), count_tokens)
    planted = [needle for needle in (first, *extra) if needle.text]
    used = JOINT.join([*(needle.text for needle in planted), first.question])
    filler = _fill(prose, tokens - count_tokens(used) - len(planted), count_tokens)
    phase = (_GOLDEN * index + TASKS.index(task) / len(TASKS)) % 1.0
    context = JOINT.join(_plant(filler, [needle.text for needle in planted], phase))
    parts = [
        {"type": "text", "text": context, "modality": "context"},
        {"type": "text", "text": first.question},
    ]
    return Sample(
        id=f"{split}-{task}-{index:06d}",
        task=task,
        messages=({"role": "user", "content": parts},),
        reply=first.reply or None,
        followups=tuple(Turn(needle.question, needle.reply) for needle in extra),
    )


def normalise(text: str) -> str:
    """Lower-case words and numbers, everything else a single space."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def is_correct(answer: str, reply: str) -> bool:
    """True when the answer contains every part of the reply, apart from case and punctuation."""
    given = f" {normalise(answer)} "
    return all(f" {normalise(part)} " in given for part in reply.split(PARTS))


def _check(task: str, tokens: int, followups: int) -> None:
    """Refuse arguments that no sample can satisfy."""
    if task not in TASKS:
        raise UsageError(f"expected a task among {', '.join(TASKS)}; found '{task}'.")
    if tokens < MIN_TOKENS:
        raise UsageError(f"expected at least {MIN_TOKENS} tokens per sample; found {tokens}.")
    if not 0 <= followups <= MAX_FOLLOWUPS:
        raise UsageError(f"expected 0 to {MAX_FOLLOWUPS} follow-ups; found {followups}.")


def _is_clear(sample: Sample) -> bool:
    """True when every part of every reply occurs once in the context."""
    context = sample.messages[0]["content"][0]["text"]
    replies = [sample.reply or "", *(turn.reply for turn in sample.followups)]
    parts = [part for reply in replies if reply for part in reply.split(PARTS)]
    return all(context.count(part) == 1 for part in parts)


def _followup_kinds(task: str, index: int, followups: int) -> list[str]:
    """Kinds other than the task's own, in an order that turns with the index."""
    kinds = [kind for kind in FOLLOWUP_KINDS if kind != task]
    return [kinds[(index + offset) % len(kinds)] for offset in range(followups)]


def _first_needle(
    task: str, rng: Random, prose: Sequence[str], budget: int, count_tokens: CountTokens
) -> tuple[Needle, Sequence[str]]:
    """The sample's own question, and the prose that may surround it.

    `budget`: tokens of prose that will certainly be part of the context.
    """
    if task in NEEDLES:
        return NEEDLES[task](rng), prose
    if task == "continuation":
        question = "Summarize the text above in three sentences."
        return Needle(task, "", question, ""), prose
    if task == "copy":
        passage = rng.choice([text for text in prose if 60 <= len(text) <= 140])
        return inscription(passage), [text for text in prose if text != passage]
    return _next_sentence(rng, _fill(prose, budget, count_tokens)[:-1]), prose


def _next_sentence(rng: Random, context: Sequence[str]) -> Needle:
    """Ask for the sentence after a given one; nothing is planted."""
    text = JOINT.join(context)
    pairs = [
        (" ".join(before.split()[:8]), after)
        for paragraph in context
        for before, after in pairwise(split_sentences(paragraph))
        if len(before.split()) >= 8 and 40 <= len(after) <= 160
    ]
    clear = [pair for pair in pairs if text.count(pair[0]) == text.count(pair[1]) == 1]
    if not clear:
        raise UsageError("expected prose with pairs of sentences; found none. Ask for more tokens.")
    opening, after = rng.choice(clear)
    question = f"Quote the sentence that follows the sentence beginning with: {opening}"
    return Needle("prose_qa", "", question, after)


def _fill(prose: Sequence[str], budget: int, count_tokens: CountTokens) -> list[str]:
    """Consecutive paragraphs of `budget` tokens; the last one is cut between words."""
    filler: list[str] = []
    left = budget
    for text in prose:
        size = count_tokens(JOINT + text)
        if size >= left:
            return [*filler, _cut(text, left, count_tokens)] if left > 0 else filler
        filler.append(text)
        left -= size
    available = budget - left
    raise UsageError(
        f"expected at most about {available} tokens per sample, all the prose of the split; "
        f"found a request for {budget} of prose. Ask for shorter samples."
    )


def _cut(text: str, budget: int, count_tokens: CountTokens) -> str:
    """The longest beginning of a paragraph, in whole words, of at most `budget` tokens."""
    words = text.split()
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = count_tokens(JOINT + " ".join(words[:middle])) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])


def _plant(filler: Sequence[str], texts: Sequence[str], phase: float) -> list[str]:
    """Insert text j between paragraphs at depth (phase + j / number of texts) mod 1."""
    ends = [0]
    for paragraph in filler:
        ends.append(ends[-1] + len(paragraph))
    places: dict[int, list[str]] = {}
    for number, text in enumerate(texts):
        depth = (phase + number / len(texts)) % 1.0 * ends[-1]
        nearest = min(range(len(ends)), key=lambda gap: abs(ends[gap] - depth))
        places.setdefault(nearest, []).append(text)
    woven = list(places.get(0, []))
    for gap, paragraph in enumerate(filler, start=1):
        woven += [paragraph, *places.get(gap, [])]
    return woven
