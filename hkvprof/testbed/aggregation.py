"""Aggregation tasks: the reply sums up many cells or many images."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hkvprof.testbed.registry import Question, Registry, label_of, tally_of
from hkvprof.testbed.scenes import FEATURES, Scene
from hkvprof.testbed.vocabulary import cell_name, colour_of, is_item, item_class, shape_of

AGGREGATION_TASKS = Registry(aggregation=True)


@AGGREGATION_TASKS.task("count")
def ask_count(scene: Scene, rng: random.Random) -> Question | None:
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
    return Question("count", text, str(count), (image, feature, value), scope=(image,))


def _ask_majority(
    name: str, scene: Scene, scope: Sequence[int], margin: float, rng: random.Random
) -> Question | None:
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
    return Question(name, text, names[tally.index(first)], key, scope=tuple(scope))


@AGGREGATION_TASKS.task("maj")
def ask_maj(scene: Scene, rng: random.Random) -> Question | None:
    """The commonest colour or shape of one image."""
    return _ask_majority("maj", scene, [rng.choice(scene.item_images)], 0.0, rng)


@AGGREGATION_TASKS.task("majall", several_images=True)
def ask_majall(scene: Scene, rng: random.Random) -> Question | None:
    """The commonest colour or shape of all images, with a lead of 4% of the items."""
    return _ask_majority("majall", scene, range(len(scene.images)), 0.04, rng)


@AGGREGATION_TASKS.task("more")
def ask_more(scene: Scene, rng: random.Random) -> Question | None:
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
    return Question("more", text, reply, (feature, scope, first, second), scope=scope)


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
def ask_any(scene: Scene, rng: random.Random) -> Question | None:
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
    return Question("any", text, "yes" if exists else "no", text)


@AGGREGATION_TASKS.task("nimg", several_images=True)
def ask_nimg(scene: Scene, rng: random.Random) -> Question | None:
    """In how many images an item occurs, at most nine; answers of one are thinned out."""
    if rng.random() < 0.8:
        cell = rng.choice(list(scene.images_with))
    else:
        cell = item_class(rng.randrange(8), rng.randrange(8))
    count = len(scene.images_with.get(cell, []))
    if not is_item(cell) or count > 9 or (count == 1 and rng.random() < 0.6):
        return None
    return Question("nimg", f"how many images have a {cell_name(cell)}", str(count), cell)


def _ask_most(
    name: str, scene: Scene, images: Sequence[int], rng: random.Random
) -> Question | None:
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
    return Question(name, text, reply, (feature, value, tuple(images)), shares=shares)


def _has_two_item_images(scene: Scene) -> bool:
    return len(scene.item_images) > 1


@AGGREGATION_TASKS.task("top", _has_two_item_images, several_images=True)
def ask_top(scene: Scene, rng: random.Random) -> Question | None:
    """Which image has the most of a colour or shape."""
    return _ask_most("top", scene, scene.item_images, rng)


@AGGREGATION_TASKS.task("cmp", _has_two_item_images, several_images=True)
def ask_cmp(scene: Scene, rng: random.Random) -> Question | None:
    """Which of two named images has more of a colour or shape."""
    return _ask_most("cmp", scene, rng.sample(scene.item_images, 2), rng)
