"""Facts that are planted in long texts, with the question that asks for them.

The wordings were chosen on the calibration split so that SmolLM2-135M-Instruct with its full
cache answers most of them. A fact of its own, bound to a named place or person, works ("The
passkey for the north gate is ..."); "The secret passkey is ..." it answers with prose about keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

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
