"""Samples for profiling and evaluation, drawn from a seed.

Calibration and held-out samples cannot share a picture: the parity of a scene's digest decides
the split that it belongs to, and scenes are redrawn until it fits. The random streams differ too,
because the name of the split is part of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hkvprof.errors import UsageError
from hkvprof.samples.read import Sample, Turn
from hkvprof.testbed.rendering import render_grid
from hkvprof.testbed.scenes import Scene, consecutive_labels, draw_scene, random_labels
from hkvprof.testbed.tasks import AGGREGATION_TASKS, LOOKUP_TASKS, SceneQuestion, Task
from hkvprof.testbed.vocabulary import MAX_LABEL, MAX_ROWS

TASKS: dict[str, Task] = {**LOOKUP_TASKS, **AGGREGATION_TASKS}
"""All tasks by name; their order is part of what a seed means."""


def admitted_tasks(scene: Scene, names: Sequence[str] = tuple(TASKS)) -> list[str]:
    """The tasks among `names` that this scene can be asked."""
    several = len(scene.images) > 1
    return [
        name
        for name in names
        if TASKS[name].admits(scene) and (several or not TASKS[name].needs_several_images)
    ]


def ask_questions(
    scene: Scene,
    rng: random.Random,
    count: int,
    weights: dict[str, float] | None = None,
    names: Sequence[str] = tuple(TASKS),
) -> list[SceneQuestion]:
    """Up to `count` different questions on one scene, tasks drawn by `weights`."""
    admitted = admitted_tasks(scene, names)
    odds = [(weights or {}).get(name, 1.0) for name in admitted]
    asked: dict[Hashable, SceneQuestion] = {}
    for _ in range(4 * count if admitted else 0):
        if len(asked) == count:
            break
        question = TASKS[rng.choices(admitted, odds)[0]].ask(scene, rng)
        if question is not None:
            asked.setdefault((question.task, question.key), question)
    return list(asked.values())


Split = Literal["calibration", "heldout"]
Labels = Literal["consecutive", "random"]


@dataclass(frozen=True)
class SampleShape:
    """How a sample looks: images of `rows` x `cols` cells with their labels, further questions.

    The checkpoint was trained on 1 to 16 images with grids from 2x4 to 6x6 cells.
    """

    images: int = 8
    rows: int = 4
    cols: int = 4
    followups: int = 0
    labels: Labels = "consecutive"

    def __str__(self) -> str:
        """As a sample's random stream is named; stable."""
        return f"{self.images}/{self.rows}x{self.cols}/{self.followups}/{self.labels}"


_PARITY: dict[str, int] = {"calibration": 0, "heldout": 1}
_MAX_DRAWS = 10_000


def scene_split(scene: Scene) -> Split:
    """The one split whose samples may show this scene."""
    return "heldout" if int(scene.digest[-1], 16) % 2 else "calibration"


def _check_request(task: str, split: str, shape: SampleShape) -> None:
    """Refuse what no scene can satisfy, saying what is possible."""
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if split not in _PARITY:
        raise UsageError(f"unknown split {split!r}: expected calibration or heldout")
    if shape.labels not in ("consecutive", "random"):
        raise UsageError(f"unknown labels {shape.labels!r}: expected consecutive or random")
    if not (2 <= shape.rows <= MAX_ROWS and 2 <= shape.cols <= MAX_ROWS):
        raise UsageError(
            f"grid {shape.rows}x{shape.cols}: expected 2 to {MAX_ROWS} rows and columns"
        )
    least = 2 if TASKS[task].needs_several_images else 1
    if not least <= shape.images <= MAX_LABEL:
        raise UsageError(f"task {task!r} takes {least} to {MAX_LABEL} images, not {shape.images}")
    if not 0 <= shape.followups <= 8:
        raise UsageError(f"expected 0 to 8 followups, not {shape.followups}")


def draw_question(
    task: str, rng: random.Random, split: Split, shape: SampleShape
) -> tuple[Scene, list[SceneQuestion]]:
    """A scene of the split with a question of the task, and further questions of any task."""
    for _ in range(_MAX_DRAWS):
        scene = _draw_scene(rng, shape)
        if scene_split(scene) != split:
            continue
        first = ask_questions(scene, rng, 1, names=[task])
        if not first:
            continue
        more = [
            question
            for question in ask_questions(scene, rng, shape.followups + 1)
            if (question.task, question.key) != (first[0].task, first[0].key)
        ]
        if len(more) >= shape.followups:
            return scene, first + more[: shape.followups]
    raise UsageError(
        f"no scene of {shape.images} images, {shape.rows}x{shape.cols}, admits {task!r} with "
        f"{shape.followups} followups ({_MAX_DRAWS} tried): ask for more images, a larger grid or "
        "fewer followups"
    )


def _draw_scene(rng: random.Random, shape: SampleShape) -> Scene:
    consecutive = shape.labels == "consecutive"
    labels = consecutive_labels(shape.images) if consecutive else random_labels(shape.images, rng)
    return draw_scene(rng, labels, shape.rows, shape.cols, rng.randint(1, 3))


def scene_messages(
    scene: Scene, question: str, render_rng: random.Random | None = None
) -> tuple[dict[str, Any], ...]:
    """The chat messages of a question: context parts with in-memory images, the question last."""
    content: list[dict[str, Any]] = []
    for part in scene.prompt_parts():
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            image = render_grid(scene.images[part], scene.rows, scene.columns, render_rng)
            content.append({"type": "image", "image": image})
    content.append({"type": "text", "text": question})
    return ({"role": "user", "content": content},)


def make_sample(
    task: str,
    seed: int,
    images: int = 8,
    rows: int = 4,
    cols: int = 4,
    split: Split = "calibration",
    followups: int = 0,
    labels: Labels = "consecutive",
) -> Sample:
    """`draw_sample` with the fields of its shape as arguments."""
    return draw_sample(task, seed, split, SampleShape(images, rows, cols, followups, labels))


def draw_sample(task: str, seed: int, split: Split, shape: SampleShape) -> Sample:
    """The sample number `seed` of a task and split: a pure function of its arguments.

    Raises UsageError where no scene can be so.
    """
    _check_request(task, split, shape)
    stream = f"{split}/{task}/{seed}/{shape}"
    drawn = random.Random(f"hkvprof testbed scene {stream}")
    scene, questions = draw_question(task, drawn, split, shape)
    render_rng = random.Random(f"hkvprof testbed rendering {stream}")
    return Sample(
        id=f"{split}-{task}-{seed:06d}",
        task=task,
        messages=scene_messages(scene, questions[0].text, render_rng),
        reply=questions[0].reply,
        followups=tuple(Turn(question.text, question.reply) for question in questions[1:]),
    )


def heldout_samples(
    tasks: Iterable[str], per_task: int, shape: SampleShape, first: int = 0
) -> Iterator[Sample]:
    """`per_task` held-out samples of each task, seeds from `first` on."""
    for task in tasks:
        for seed in range(first, first + per_task):
            yield draw_sample(task, seed, "heldout", shape)
