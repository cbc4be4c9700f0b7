"""Long-text tasks on real prose: a context that can be compressed, a question, a short answer.

For text-only models the long context plays the part of the vision tokens and the question that of
the text. The prose is the frozen Python Language Reference (`tools/make_prose.py`); calibration and
held-out samples draw on different topics of it and share no paragraph.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, count, pairwise
from pathlib import Path
from random import Random

from hkvprof.errors import UsageError
from hkvprof.samples.read import Sample, Turn

PARTS = "; "  # joins the parts of a reply that asks for several facts


def _listed(text: str, separator: str = " ") -> tuple[str, ...]:
    """The entries of a written list."""
    return tuple(text.split(separator))


_WORDS = _listed(
    "amber anchor apple arrow autumn basket beacon bottle branch bridge butter candle canyon "
    "carpet castle cedar cherry circle clover copper coral cotton cradle crystal dancer desert "
    "dragon eagle ember falcon feather forest fossil garden ginger glacier goblin hammer harbor "
    "honey island ivory jacket jungle kettle ladder lantern lemon lizard magnet maple marble "
    "meadow mirror monkey nectar needle ocean olive orchid oyster paddle pebble pepper pillow "
    "pirate planet pumpkin rabbit ribbon river rocket saddle salmon shadow silver spider sponge "
    "sunset thunder tiger timber tunnel turtle valley velvet violet walnut whale willow winter"
)
_PEOPLE = _listed(
    "Clara Voss, Martin Hale, Irene Castle, Oscar Lindt, Nadia Brook, Felix Archer, Helen Marsh, "
    "Victor Stone, Alice Warren, Simon Field",
    ", ",
)
_NAMES = _listed(
    "Anna Bruno Carla David Elena Frank Greta Henry Ines Jonas Karin Louis Maria Peter Rosa Tomas"
)
_PLACES = _listed(
    "north gate, old lighthouse, observatory, museum vault, boat house, city archive", ", "
)
_HOUSES = _listed(
    "harbour office, night train, mountain hut, town library, chess club, botanical garden", ", "
)
_TOWNS = _listed("Brindle Oakmere Westfold Larkham Ashford Millbrook Stonehaven Redcliff")
_VIRTUES = _listed("Patience Courage Honesty Kindness Wisdom Friendship Curiosity Hope")
_VERBS = _listed("outlasts conquers welcomes outshines softens guides follows calms")
_OBJECTS = _listed("storms mountains strangers shadows winters rivers giants sorrows")


@dataclass(frozen=True)
class Needle:
    """A planted fact. `text` is its paragraph, `reply` the shortest correct answer.

    `reply` stands in `text` word for word; with several facts, its parts do.
    """

    kind: str
    text: str
    question: str
    reply: str


def _passkey(rng: Random) -> Needle:
    place = rng.choice(_PLACES)
    number = str(rng.randrange(10_000, 100_000))
    text = f"The passkey for the {place} is {number}."
    return Needle("passkey", text, f"What is the passkey for the {place}?", number)


def _words(rng: Random) -> Needle:
    house = rng.choice(_HOUSES)
    words = " ".join(rng.sample(_WORDS, 3))
    text = f'The password of the {house} is "{words}".'
    return Needle("needle_words", text, f"What is the password of the {house}?", words)


def _phone(rng: Random) -> Needle:
    person = rng.choice(_PEOPLE)
    number = f"{rng.randrange(200, 1000)}-{rng.randrange(10_000):04d}"
    text = f"The phone number of {person} is {number}."
    return Needle("needle_phone", text, f"What is the phone number of {person}?", number)


def _motto(rng: Random) -> Needle:
    town = rng.choice(_TOWNS)
    motto = f"{rng.choice(_VIRTUES)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}"
    text = f'The motto of the town of {town} is "{motto}".'
    return Needle("needle_motto", text, f"What is the motto of the town of {town}?", motto)


def _two(rng: Random) -> Needle:
    east, west = (str(code) for code in rng.sample(range(1000, 10_000), 2))
    text = (
        f"The access code of the east gate is {east}. The access code of the west gate is {west}."
    )
    question = (
        "What is the access code of the east gate, and what is the access code of the west gate?"
    )
    return Needle("two_needles", text, question, PARTS.join((east, west)))


def _key_value(rng: Random) -> Needle:
    """Twelve keys in one paragraph; hard for a small model even with its full cache."""
    names = rng.sample(_NAMES, 12)
    values = [str(value) for value in rng.sample(range(1000, 10_000), len(names))]
    asked = rng.randrange(len(names))
    pairs = zip(names, values, strict=True)
    text = " ".join(f"The locker number of {name} is {value}." for name, value in pairs)
    question = f"What is the locker number of {names[asked]}?"
    return Needle("kv", text, question, values[asked])


def inscription(passage: str) -> Needle:
    """A passage of the corpus, planted to be repeated word for word."""
    text = f'The notice on the door of the theatre says: "{passage}"'
    return Needle("copy", text, "What does the notice on the door of the theatre say?", passage)


NEEDLES: dict[str, Callable[[Random], Needle]] = {
    "passkey": _passkey,
    "needle_words": _words,
    "needle_phone": _phone,
    "needle_motto": _motto,
    "two_needles": _two,
    "kv": _key_value,
}
FOLLOWUP_KINDS = ("passkey", "needle_words", "needle_phone", "needle_motto")


CountTokens = Callable[[str], int]

PROSE = Path(__file__).parent / "data" / "prose.json.gz"
SPLITS = ("calibration", "heldout")
TASKS = (*NEEDLES, "prose_qa", "copy", "continuation")
JOINT = "\n\n"  # between paragraphs, and between context and question
MIN_TOKENS = 600  # shorter ones may hold no clear pair of sentences to ask about
MAX_FOLLOWUPS = len(FOLLOWUP_KINDS) - 1
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it modulo 1 spread evenly, for any count


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


def make_samples(
    count: int,
    tokens: tuple[int, int],
    split: str,
    tasks: Sequence[str] = TASKS,
    count_tokens: CountTokens = count_words,
) -> list[Sample]:
    """`count` samples of lengths between `tokens`, evenly spread in their logarithm; the tasks take
    turns, odd rounds follow up."""
    lengths = Random(f"longtext lengths {split}")
    samples = []
    for number in range(count):
        index, place = divmod(number, len(tasks))
        samples.append(
            make_sample(
                tasks[place],
                index,
                tokens=round(math.exp(lengths.uniform(*map(math.log, tokens)))),
                split=split,
                followups=1 + index % MAX_FOLLOWUPS if number % 2 else 0,
                count_tokens=count_tokens,
            )
        )
    return samples


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
    phase = (GOLDEN * index + TASKS.index(task) / len(TASKS)) % 1.0
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


def parse_range(text: str) -> tuple[int, int]:
    """`2000-4000` or `3000` as (lowest, highest) number of tokens."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not MIN_TOKENS <= low <= high:
        raise UsageError(
            f"expected --tokens like 2500 or 2000-4000, at least {MIN_TOKENS}; found '{text}'."
        )
    return low, high


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


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph, split where a full stop is followed by a capital."""
    return re.split(r'(?<=[a-z)"][.!?]) +(?=["A-Z])', paragraph)


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
