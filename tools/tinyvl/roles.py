"""What the auxiliary heads of training predict: targets per token and per question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hkvprof.testbed.scenes import Fact, ImageKind, Scene
from hkvprof.testbed.tasks import SceneQuestion
from hkvprof.testbed.vocabulary import (
    COLOUR_NAMES,
    GLYPHS,
    MAX_COLUMNS,
    MAX_LABEL,
    MAX_ROWS,
    ROW_NAMES,
    SHAPE_NAMES,
    colour_of,
    is_glyph,
    is_item,
    shape_of,
)

IGNORE = -100
"""A target that no loss sees."""
_COLOUR_CLASSES = len(COLOUR_NAMES) + 1
_SHAPE_CLASSES = len(SHAPE_NAMES) + 1
_GLYPH_CLASSES = len(GLYPHS) + 1
HISTOGRAM_SIZE = _COLOUR_CLASSES + _SHAPE_CLASSES

ROLES: dict[str, int] = {
    "label": MAX_LABEL + 1,
    "row": MAX_ROWS,
    "column": MAX_COLUMNS,
    "colour": _COLOUR_CLASSES,
    "shape": _SHAPE_CLASSES,
    "glyph": _GLYPH_CLASSES,
    "changed": 2,
    "previous colour": _COLOUR_CLASSES,
    "previous shape": _SHAPE_CLASSES,
    "previous glyph": _GLYPH_CLASSES,
}
"""What the auxiliary heads of training predict from a token, with the number of classes."""
ROLE_INDEX = {name: index for index, name in enumerate(ROLES)}

Ints = npt.NDArray[np.int64]
NO_ROLE = np.full(len(ROLES), IGNORE, np.int64)


@lru_cache(maxsize=256)
def _cell_roles(cell: int) -> tuple[int, int, int]:
    """Colour, shape and glyph of a cell; the last class of each stands for none."""
    colour = colour_of(cell) if is_item(cell) else _COLOUR_CLASSES - 1
    shape = shape_of(cell) if is_item(cell) else _SHAPE_CLASSES - 1
    glyph = cell - 1 if is_glyph(cell) else _GLYPH_CLASSES - 1
    return colour, shape, glyph


def image_roles(scene: Scene, image: int) -> Ints:
    """[cells, roles] of the visual tokens of an image."""
    cells = scene.images[image]
    roles = np.full((len(cells), len(ROLES)), IGNORE, np.int64)
    roles[:, 0] = scene.labels[image]
    places = np.arange(len(cells))
    roles[:, 1], roles[:, 2] = places // scene.columns, places % scene.columns
    roles[:, 3:6] = [_cell_roles(cell) for cell in cells]
    if scene.kinds[image] is ImageKind.ITEMS:
        roles[:, 6] = 0
    if image in scene.changes:
        roles[scene.changes[image].position, 6] = 1
    if image:
        roles[:, 7:10] = [_cell_roles(cell) for cell in scene.images[image - 1]]
    return roles


def _fact_roles(fact: Fact) -> Ints:
    """Colour and shape on the tokens `is d d d` of `code colour shape is d d d .`."""
    roles = np.tile(NO_ROLE, (8, 1))
    roles[3:7, ROLE_INDEX["colour"]] = COLOUR_NAMES.index(fact.colour)
    roles[3:7, ROLE_INDEX["shape"]] = SHAPE_NAMES.index(fact.shape)
    return roles


@lru_cache(maxsize=65536)
def question_roles(text: str) -> tuple[int, ...]:
    """What a question asks about; a role that it names twice is left out."""
    named: dict[str, list[int]] = {}
    words = text.split()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("#"):
            named.setdefault("label", []).append(int(word[1:]))
        elif word == "row":
            named.setdefault("row", []).append(ROW_NAMES.index(following))
        elif word == "at":
            named.setdefault("row", []).append(ROW_NAMES.index(following[0]))
            named.setdefault("column", []).append(int(following[1:]) - 1)
        elif word in COLOUR_NAMES:
            named.setdefault("colour", []).append(COLOUR_NAMES.index(word))
        elif word in SHAPE_NAMES:
            named.setdefault("shape", []).append(SHAPE_NAMES.index(word))
    values = {role: found[0] for role, found in named.items() if len(found) == 1}
    return tuple(values.get(role, IGNORE) for role in ROLES)


def text_roles(scene: Scene, text: str) -> Ints | None:
    """[tokens, roles] of a context text that states a fact."""
    for fact in scene.facts:
        if fact.sentence == text:
            return _fact_roles(fact)
    return None


def scope_histogram(scene: Scene, scope: Sequence[int]) -> list[float]:
    """Shares of the colours (8 and none), then of the shapes, over all cells of the images."""
    histogram = [0.0] * HISTOGRAM_SIZE
    weight = 1 / (len(scope) * scene.rows * scene.columns)
    for image in scope:
        for cell in scene.images[image]:
            colour, shape, _ = _cell_roles(cell)
            histogram[colour] += weight
            histogram[_COLOUR_CLASSES + shape] += weight
    return histogram


def label_shares(question: SceneQuestion) -> list[float]:
    """Share of the items asked for per label, [labels + 1]; label 0 does not occur."""
    shares = [0.0] * (MAX_LABEL + 1)
    for label, share in question.shares:
        shares[label] = share
    return shares
