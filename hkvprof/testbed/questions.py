"""The questions of the testbed: which tasks a scene admits, and drawing questions on it.

Every task is one function, from a scene to a question with its reply, registered by name: look-up
tasks in lookup.py, aggregation tasks in aggregation.py. A function returns None where its draw
does not admit a question (a tie, an item that is not unique).
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from hkvprof.testbed.aggregation import AGGREGATION_TASKS
from hkvprof.testbed.lookup import LOOKUP_TASKS
from hkvprof.testbed.registry import Question, Task
from hkvprof.testbed.scenes import Scene

__all__ = ["TASKS", "Question", "admitted_tasks", "ask_questions"]

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
) -> list[Question]:
    """Up to `count` different questions on one scene, tasks drawn by `weights`."""
    admitted = admitted_tasks(scene, names)
    odds = [(weights or {}).get(name, 1.0) for name in admitted]
    asked: dict[Hashable, Question] = {}
    for _ in range(4 * count if admitted else 0):
        if len(asked) == count:
            break
        question = TASKS[rng.choices(admitted, odds)[0]].ask(scene, rng)
        if question is not None:
            asked.setdefault((question.task, question.key), question)
    return list(asked.values())
