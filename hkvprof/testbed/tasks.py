"""The tasks: how each asks about a scene, and their registry.

Look-up tasks: the reply stands in one place of one image, or of the text. Aggregation tasks: the
reply sums up many cells or many images.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from hkvprof.testbed.scenes import FEATURES, Scene
from hkvprof.testbed.vocabulary import (
    BLANK,
    ROW_NAMES,
    cell_name,
    colour_of,
    is_item,
    item_class,
    place_name,
    shape_of,
)


@dataclass(frozen=True)
class SceneQuestion:
    """A question with its reply; `key` tells repeats apart.

    The other fields are for the auxiliary losses of training: `scope`, the images whose colours
    and shapes the reply sums up; `shares`, per label, what part of the items asked for it holds.
    """

    task: str
    text: str
    reply: str
    key: Hashable
    scope: tuple[int, ...] = ()
    shares: tuple[tuple[int, float], ...] = ()

    @property
    def number(self) -> int | None:
        """The reply of a counting task."""
        return int(self.reply) if self.task in ("count", "nimg") else None


Ask = Callable[[Scene, random.Random], SceneQuestion | None]


@dataclass(frozen=True)
class Task:
    """A registered task: how to ask, and what a scene needs for it."""

    name: str
    ask: Ask
    admits: Callable[[Scene], bool]
    is_aggregation: bool
    needs_several_images: bool


def has_items(scene: Scene) -> bool:
    """Whether some image holds coloured shapes."""
    return bool(scene.item_images)


class Registry(dict[str, Task]):
    """Tasks by name, in the order of registration."""

    def __init__(self, *, aggregation: bool) -> None:
        super().__init__()
        self._aggregation = aggregation

    def task(
        self,
        name: str,
        admits: Callable[[Scene], bool] = has_items,
        *,
        several_images: bool = False,
    ) -> Callable[[Ask], Ask]:
        """Register a function under the name of its task."""

        def register(ask: Ask) -> Ask:
            self[name] = Task(name, ask, admits, self._aggregation, several_images)
            return ask

        return register


def label_of(scene: Scene, image: int) -> str:
    """How questions name an image: `image #3`."""
    return f"image #{scene.labels[image]}"


def tally_of(scene: Scene, images: Sequence[int], feature: int) -> list[int]:
    """How often each colour (feature 0) or shape (1) occurs in the images."""
    names, read = FEATURES[feature]
    tally = [0] * len(names)
    for image in images:
        for cell in scene.items(image):
            tally[read(cell)] += 1
    return tally


LOOKUP_TASKS = Registry(aggregation=False)


@LOOKUP_TASKS.task("ocr", lambda scene: bool(scene.text_images))
def ask_ocr(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Read the characters of one row of a text image."""
    image, row = rng.choice(scene.text_images), rng.randrange(scene.rows)
    reply = "".join(cell_name(cell) for cell in scene.row(image, row) if cell != BLANK)
    text = f"read row {ROW_NAMES[row]} of {label_of(scene, image)}"
    return SceneQuestion("ocr", text, reply, (image, row))


@LOOKUP_TASKS.task("list")
def ask_list(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Name all cells of one row of an item image."""
    image, row = rng.choice(scene.item_images), rng.randrange(scene.rows)
    reply = " ".join(cell_name(cell) for cell in scene.row(image, row))
    text = f"list row {ROW_NAMES[row]} of {label_of(scene, image)}"
    return SceneQuestion("list", text, reply, (image, row))


@LOOKUP_TASKS.task("cell")
def ask_cell(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Name one cell of any image."""
    image = rng.randrange(len(scene.images))
    position = rng.randrange(scene.rows) * scene.columns + rng.randrange(scene.columns)
    text = f"what is at {place_name(position, scene.columns)} of {label_of(scene, image)}"
    return SceneQuestion("cell", text, cell_name(scene.images[image][position]), (image, position))


@LOOKUP_TASKS.task("attr")
def ask_attr(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """The colour of a shape that occurs once in an image."""
    image = rng.choice(scene.item_images)
    tally = tally_of(scene, [image], 1)
    unique = [shape for shape, count in enumerate(tally) if count == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    (cell,) = (cell for cell in scene.items(image) if shape_of(cell) == shape)
    colours, shapes = FEATURES[0][0], FEATURES[1][0]
    text = f"what colour is the {shapes[shape]} of {label_of(scene, image)}"
    return SceneQuestion("attr", text, colours[colour_of(cell)], (image, shape))


@LOOKUP_TASKS.task("find")
def ask_find(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """The place of an item that occurs once in an image."""
    image = rng.choice(scene.item_images)
    cells = scene.images[image]
    unique = [cell for cell in sorted(set(cells)) if is_item(cell) and cells.count(cell) == 1]
    if not unique:
        return None
    cell = rng.choice(unique)
    text = f"where is the {cell_name(cell)} of {label_of(scene, image)}"
    return SceneQuestion("find", text, place_name(cells.index(cell), scene.columns), (image, cell))


@LOOKUP_TASKS.task("which", several_images=True)
def ask_which(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """The image that alone holds an item."""
    holders = scene.images_with
    unique = [cell for cell, images in holders.items() if is_item(cell) and len(images) == 1]
    if not unique:
        return None
    cell = rng.choice(unique)
    text = f"which image has the {cell_name(cell)}"
    return SceneQuestion("which", text, f"#{scene.labels[holders[cell][0]]}", cell)


@LOOKUP_TASKS.task("kv", lambda scene: bool(scene.facts))
def ask_kv(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """A code stated in the text between the images."""
    fact = rng.choice(scene.facts)
    text = f"code for {fact.colour} {fact.shape}"
    return SceneQuestion("kv", text, fact.digits, text)


@LOOKUP_TASKS.task("diff", lambda scene: bool(scene.changes), several_images=True)
def ask_diff(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """What changed in an image since the image before it."""
    image = rng.choice(list(scene.changes))
    change = scene.changes[image]
    place = place_name(change.position, scene.columns)
    reply = f"{place} {cell_name(change.before)} to {cell_name(change.after)}"
    return SceneQuestion("diff", f"what changed in {label_of(scene, image)}", reply, image)


AGGREGATION_TASKS = Registry(aggregation=True)


@AGGREGATION_TASKS.task("count")
def ask_count(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """How many items of a colour or shape an image has, at most nine."""
    image = rng.choice(scene.item_images)
    feature = rng.randrange(2)
    names, read = FEATURES[feature]
    if rng.random() < 0.85:
        value = read(rng.choice(scene.items(image)))
    else:
        value = rng.randrange(len(names))
    count = tally_of(scene, [image], feature)[value]
    if count > 9:
        return None
    text = f"how many {names[value]} of {label_of(scene, image)}"
    return SceneQuestion("count", text, str(count), (image, feature, value), scope=(image,))


def _ask_majority(
    name: str, scene: Scene, scope: Sequence[int], margin: float, rng: random.Random
) -> SceneQuestion | None:
    """The commonest colour or shape; `margin` is the least lead, as a share of all items."""
    feature = rng.randrange(2)
    names, _ = FEATURES[feature]
    tally = tally_of(scene, scope, feature)
    second, first = sorted(tally)[-2:]
    lead = max(2.0, margin * sum(tally)) if margin else 1
    if first - second < lead:
        return None
    place = "all images" if name == "majall" else label_of(scene, scope[0])
    text = f"what {('colour', 'shape')[feature]} is most common in {place}"
    key = (feature, scope[0])
    return SceneQuestion(name, text, names[tally.index(first)], key, scope=tuple(scope))


@AGGREGATION_TASKS.task("maj")
def ask_maj(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """The commonest colour or shape of one image."""
    return _ask_majority("maj", scene, [rng.choice(scene.item_images)], 0.0, rng)


@AGGREGATION_TASKS.task("majall", several_images=True)
def ask_majall(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """The commonest colour or shape of all images, with a lead of 4% of the items."""
    return _ask_majority("majall", scene, range(len(scene.images)), 0.04, rng)


@AGGREGATION_TASKS.task("more")
def ask_more(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Which of two colours or shapes is more frequent in one image, or in all."""
    feature = rng.randrange(2)
    names, _ = FEATURES[feature]
    image = rng.choice(scene.item_images)
    everywhere = len(scene.images) > 1 and rng.random() < 0.5
    scope = tuple(range(len(scene.images))) if everywhere else (image,)
    tally = tally_of(scene, scope, feature)
    first, second = rng.sample(range(len(names)), 2)
    lead = max(2.0, 0.02 * sum(tally)) if everywhere else 1
    if abs(tally[first] - tally[second]) < lead:
        return None
    place = "all images" if everywhere else label_of(scene, image)
    text = f"which is more {names[first]} or {names[second]} in {place}"
    reply = names[first if tally[first] > tally[second] else second]
    return SceneQuestion("more", text, reply, (feature, scope, first, second), scope=scope)


def _candidate_feature(present: set[int], exists: bool, rng: random.Random) -> str | None:
    """A colour or shape that occurs, or one that does not."""
    names, read = FEATURES[rng.randrange(2)]
    found = {read(cell) for cell in present}
    candidates = [value for value in range(len(names)) if (value in found) == exists]
    return names[rng.choice(candidates)] if candidates else None


def _candidate_item(present: set[int], exists: bool, rng: random.Random) -> str | None:
    """An item that occurs, or a new combination of a colour and a shape that occur."""
    if exists:
        candidates = sorted(present)
    else:
        colours = sorted({colour_of(cell) for cell in present})
        shapes = sorted({shape_of(cell) for cell in present})
        combined = [item_class(colour, shape) for colour in colours for shape in shapes]
        candidates = [cell for cell in combined if cell not in present]
    return cell_name(rng.choice(candidates)) if candidates else None


@AGGREGATION_TASKS.task("any")
def ask_any(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Whether an item, a colour or a shape occurs in one image, or in all."""
    image = rng.choice(scene.item_images)
    everywhere = len(scene.images) > 1 and rng.random() < 0.4
    scope = scene.item_images if everywhere else [image]
    present = {cell for member in scope for cell in scene.items(member)}
    candidate = _candidate_feature if rng.random() < 0.3 else _candidate_item
    exists = rng.random() < 0.5
    wanted = candidate(present, exists, rng)
    if wanted is None:
        return None
    place = "all images" if everywhere else label_of(scene, image)
    text = f"is there any {wanted} in {place}"
    return SceneQuestion("any", text, "yes" if exists else "no", text)


@AGGREGATION_TASKS.task("nimg", several_images=True)
def ask_nimg(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """In how many images an item occurs, at most nine; answers of one are thinned out."""
    if rng.random() < 0.8:
        cell = rng.choice(list(scene.images_with))
    else:
        cell = item_class(rng.randrange(8), rng.randrange(8))
    count = len(scene.images_with.get(cell, []))
    if not is_item(cell) or count > 9 or (count == 1 and rng.random() < 0.6):
        return None
    return SceneQuestion("nimg", f"how many images have a {cell_name(cell)}", str(count), cell)


def _ask_most(
    name: str, scene: Scene, images: Sequence[int], rng: random.Random
) -> SceneQuestion | None:
    """Which of the images has most of a colour or shape that the first of them has."""
    feature = rng.randrange(2)
    names, read = FEATURES[feature]
    value = read(rng.choice(scene.items(images[0])))
    counts = [tally_of(scene, [image], feature)[value] for image in images]
    second, first = sorted(counts)[-2:]
    if first == second:
        return None
    labels = [scene.labels[image] for image in images]
    if name == "top":
        text = f"which image has the most {names[value]}"
    else:
        text = f"which image has more {names[value]} #{labels[0]} or #{labels[1]}"
    shares = tuple((lab, n / sum(counts)) for lab, n in zip(labels, counts, strict=True))
    reply = f"#{labels[counts.index(first)]}"
    return SceneQuestion(name, text, reply, (feature, value, tuple(images)), shares=shares)


def _has_two_item_images(scene: Scene) -> bool:
    return len(scene.item_images) > 1


@AGGREGATION_TASKS.task("top", _has_two_item_images, several_images=True)
def ask_top(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Which image has the most of a colour or shape."""
    return _ask_most("top", scene, scene.item_images, rng)


@AGGREGATION_TASKS.task("cmp", _has_two_item_images, several_images=True)
def ask_cmp(scene: Scene, rng: random.Random) -> SceneQuestion | None:
    """Which of two named images has more of a colour or shape."""
    return _ask_most("cmp", scene, rng.sample(scene.item_images, 2), rng)
