"""Look-up tasks: the reply stands in one place of one image, or of the text."""

from __future__ import annotations

import random

from hkvprof.testbed.registry import Question, Registry, label_of, tally_of
from hkvprof.testbed.scenes import FEATURES, Scene
from hkvprof.testbed.vocabulary import (
    BLANK,
    ROW_NAMES,
    cell_name,
    colour_of,
    is_item,
    place_name,
    shape_of,
)

LOOKUP_TASKS = Registry(aggregation=False)


@LOOKUP_TASKS.task("ocr", lambda scene: bool(scene.text_images))
def ask_ocr(scene: Scene, rng: random.Random) -> Question | None:
    """Read the characters of one row of a text image."""
    image, row = rng.choice(scene.text_images), rng.randrange(scene.rows)
    reply = "".join(cell_name(cell) for cell in scene.row(image, row) if cell != BLANK)
    text = f"read row {ROW_NAMES[row]} of {label_of(scene, image)}"
    return Question("ocr", text, reply, (image, row))


@LOOKUP_TASKS.task("list")
def ask_list(scene: Scene, rng: random.Random) -> Question | None:
    """Name all cells of one row of an item image."""
    image, row = rng.choice(scene.item_images), rng.randrange(scene.rows)
    reply = " ".join(cell_name(cell) for cell in scene.row(image, row))
    text = f"list row {ROW_NAMES[row]} of {label_of(scene, image)}"
    return Question("list", text, reply, (image, row))


@LOOKUP_TASKS.task("cell")
def ask_cell(scene: Scene, rng: random.Random) -> Question | None:
    """Name one cell of any image."""
    image = rng.randrange(len(scene.images))
    position = rng.randrange(scene.rows) * scene.columns + rng.randrange(scene.columns)
    text = f"what is at {place_name(position, scene.columns)} of {label_of(scene, image)}"
    return Question("cell", text, cell_name(scene.images[image][position]), (image, position))


@LOOKUP_TASKS.task("attr")
def ask_attr(scene: Scene, rng: random.Random) -> Question | None:
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
    return Question("attr", text, colours[colour_of(cell)], (image, shape))


@LOOKUP_TASKS.task("find")
def ask_find(scene: Scene, rng: random.Random) -> Question | None:
    """The place of an item that occurs once in an image."""
    image = rng.choice(scene.item_images)
    cells = scene.images[image]
    unique = [cell for cell in sorted(set(cells)) if is_item(cell) and cells.count(cell) == 1]
    if not unique:
        return None
    cell = rng.choice(unique)
    text = f"where is the {cell_name(cell)} of {label_of(scene, image)}"
    return Question("find", text, place_name(cells.index(cell), scene.columns), (image, cell))


@LOOKUP_TASKS.task("which", several_images=True)
def ask_which(scene: Scene, rng: random.Random) -> Question | None:
    """The image that alone holds an item."""
    holders = scene.images_with
    unique = [cell for cell, images in holders.items() if is_item(cell) and len(images) == 1]
    if not unique:
        return None
    cell = rng.choice(unique)
    text = f"which image has the {cell_name(cell)}"
    return Question("which", text, f"#{scene.labels[holders[cell][0]]}", cell)


@LOOKUP_TASKS.task("kv", lambda scene: bool(scene.facts))
def ask_kv(scene: Scene, rng: random.Random) -> Question | None:
    """A code stated in the text between the images."""
    fact = rng.choice(scene.facts)
    text = f"code for {fact.colour} {fact.shape}"
    return Question("kv", text, fact.digits, text)


@LOOKUP_TASKS.task("diff", lambda scene: bool(scene.changes), several_images=True)
def ask_diff(scene: Scene, rng: random.Random) -> Question | None:
    """What changed in an image since the image before it."""
    image = rng.choice(list(scene.changes))
    change = scene.changes[image]
    place = place_name(change.position, scene.columns)
    reply = f"{place} {cell_name(change.before)} to {cell_name(change.after)}"
    return Question("diff", f"what changed in {label_of(scene, image)}", reply, image)
