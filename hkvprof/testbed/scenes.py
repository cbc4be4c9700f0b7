"""Scenes: several labelled grid images with facts in text between them, drawn at random.

The distribution is the one the shipped checkpoint was trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from hkvprof.testbed.vocabulary import (
    BLANK,
    COLOUR_NAMES,
    GLYPHS,
    MAX_LABEL,
    SHAPE_NAMES,
    colour_of,
    is_item,
    item_class,
    shape_of,
)

Cells = tuple[int, ...]


class ImageKind(Enum):
    """What the cells of an image hold."""

    TEXT = "text"
    ITEMS = "items"


@dataclass(frozen=True)
class Fact:
    """A three-digit code that the text after image `image` ties to a colour and a shape."""

    colour: str
    shape: str
    digits: str
    image: int

    @property
    def sentence(self) -> str:
        """The fact as the prompt states it."""
        return f"code {self.colour} {self.shape} is {self.digits} ."


@dataclass(frozen=True)
class Change:
    """The one cell in which an image differs from the image before it."""

    position: int
    before: int
    after: int


@dataclass(frozen=True)
class Scene:
    """Images as class ids in row-major order, all of one grid, with labels and facts."""

    rows: int
    columns: int
    images: tuple[Cells, ...]
    kinds: tuple[ImageKind, ...]
    labels: tuple[int, ...]
    facts: tuple[Fact, ...]
    changes: dict[int, Change]

    @cached_property
    def text_images(self) -> list[int]:
        """Positions of the images that hold characters."""
        return [i for i, kind in enumerate(self.kinds) if kind is ImageKind.TEXT]

    @cached_property
    def item_images(self) -> list[int]:
        """Positions of the images that hold coloured shapes."""
        return [i for i, kind in enumerate(self.kinds) if kind is ImageKind.ITEMS]

    @cached_property
    def images_with(self) -> dict[int, list[int]]:
        """Per cell class, the item images that hold it."""
        holders: dict[int, list[int]] = {}
        for image in self.item_images:
            for cell in sorted(set(self.images[image])):
                holders.setdefault(cell, []).append(image)
        return holders

    def row(self, image: int, row: int) -> Cells:
        """The cells of one row."""
        return self.images[image][row * self.columns : (row + 1) * self.columns]

    def items(self, image: int) -> list[int]:
        """The coloured shapes of one image, in reading order."""
        return [cell for cell in self.images[image] if is_item(cell)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pictures alone, so that other labels or facts do not make a new scene."""
        content = json.dumps([self.rows, self.columns, self.images], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def prompt_parts(self) -> list[str | int]:
        """The context in reading order: text, or the position of an image."""
        parts: list[str | int] = []
        for image, label in enumerate(self.labels):
            parts += [f"image #{label} :", image]
            parts += [fact.sentence for fact in self.facts if fact.image == image]
        return parts


@dataclass(frozen=True)
class _ItemMix:
    """How uneven the colours and shapes of a scene are.

    Flat scenes draw evenly. In the others one colour and one shape are favoured in every image,
    which gives majority questions over all images an answer.
    """

    is_flat: bool
    colour: int
    shape: int
    favour: float

    @classmethod
    def draw(cls, rng: random.Random) -> _ItemMix:
        return cls(
            is_flat=rng.random() < 0.4,
            colour=rng.randrange(len(COLOUR_NAMES)),
            shape=rng.randrange(len(SHAPE_NAMES)),
            favour=rng.choice((0.0, 0.3, 0.8)),
        )

    def weights(self, values: Sequence[int], favourite: int, rng: random.Random) -> list[float]:
        """Sampling weights of the colours (or shapes) that one image uses."""
        return [
            (1.0 if self.is_flat else 0.05 + rng.random() ** 1.5)
            + (self.favour if value == favourite else 0.0)
            for value in values
        ]


def _draw_text_image(rows: int, columns: int, rng: random.Random) -> Cells:
    """Rows of characters, left-aligned, the rest blank."""
    cells: list[int] = []
    for _ in range(rows):
        length = rng.randint(3, columns) if columns > 3 else columns
        cells += [1 + rng.randrange(len(GLYPHS)) for _ in range(length)]
        cells += [BLANK] * (columns - length)
    return tuple(cells)


def _draw_item_image(size: int, mix: _ItemMix, rng: random.Random) -> Cells:
    """`size` cells of coloured shapes from 3 to 8 colours and shapes, 12% blank."""
    colours = rng.sample(range(len(COLOUR_NAMES)), rng.randint(3, len(COLOUR_NAMES)))
    shapes = rng.sample(range(len(SHAPE_NAMES)), rng.randint(3, len(SHAPE_NAMES)))
    colour_weights = mix.weights(colours, mix.colour, rng)
    shape_weights = mix.weights(shapes, mix.shape, rng)
    drawn = zip(
        rng.choices(colours, colour_weights, k=size),
        rng.choices(shapes, shape_weights, k=size),
        strict=True,
    )
    cells = [BLANK if rng.random() < 0.12 else item_class(c, s) for c, s in drawn]
    if not any(cells):
        cells[0] = item_class(0, 0)
    return tuple(cells)


def _draw_change(cells: Cells, rng: random.Random) -> Change:
    """A change of one item to another; a blank cell never changes."""
    position = rng.choice([p for p, cell in enumerate(cells) if cell != BLANK])
    before = cells[position]
    after = before
    while after == before:
        after = item_class(rng.randrange(len(COLOUR_NAMES)), rng.randrange(len(SHAPE_NAMES)))
    return Change(position, before, after)


def _draw_facts(
    count: int, images: int, changes: dict[int, Change], rng: random.Random
) -> tuple[Fact, ...]:
    """Facts with distinct keys, none between the two images of a change."""
    keys: dict[tuple[str, str], None] = {}
    while len(keys) < count:
        keys[rng.choice(COLOUR_NAMES), rng.choice(SHAPE_NAMES)] = None
    places = [image for image in range(images) if image + 1 not in changes]
    return tuple(
        Fact(colour, shape, "".join(rng.choices("0123456789", k=3)), rng.choice(places))
        for colour, shape in keys
    )


def consecutive_labels(images: int) -> tuple[int, ...]:
    """Labels #1, #2, ... in order."""
    return tuple(range(1, images + 1))


def random_labels(images: int, rng: random.Random, highest: int = MAX_LABEL) -> tuple[int, ...]:
    """Ascending labels without repeats from #1 to `highest` (or as many as are needed)."""
    return tuple(sorted(rng.sample(range(1, max(images, highest) + 1), images)))


def draw_scene(
    rng: random.Random,
    labels: Sequence[int],
    rows: int,
    columns: int,
    facts: int,
    text_share: float = 0.45,
    with_changes: bool = True,
) -> Scene:
    """A random scene with one image per label.

    `text_share` is the share of text images. With `with_changes`, an item image is followed with
    probability 0.45 by a copy of itself in which one cell changed.
    """
    mix = _ItemMix.draw(rng)
    images: list[Cells] = []
    kinds: list[ImageKind] = []
    changes: dict[int, Change] = {}
    for index in range(len(labels)):
        follows_items = bool(kinds) and kinds[-1] is ImageKind.ITEMS
        if with_changes and follows_items and rng.random() < 0.45:
            change = _draw_change(images[-1], rng)
            changes[index] = change
            before = images[-1]
            images.append(
                (*before[: change.position], change.after, *before[change.position + 1 :])
            )
            kinds.append(ImageKind.ITEMS)
        elif rng.random() < text_share:
            images.append(_draw_text_image(rows, columns, rng))
            kinds.append(ImageKind.TEXT)
        else:
            images.append(_draw_item_image(rows * columns, mix, rng))
            kinds.append(ImageKind.ITEMS)
    return Scene(
        rows=rows,
        columns=columns,
        images=tuple(images),
        kinds=tuple(kinds),
        labels=tuple(labels),
        facts=_draw_facts(facts, len(labels), changes, rng),
        changes=changes,
    )


FEATURES: tuple[tuple[tuple[str, ...], Callable[[int], int]], ...] = (
    (COLOUR_NAMES, colour_of),
    (SHAPE_NAMES, shape_of),
)
"""The two features of items that questions aggregate: names, and how to read one off a class."""
