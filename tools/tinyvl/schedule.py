"""What is trained when: stages, curriculum of image counts and grids, learning rate, task odds.

Everything is a function of explicit arguments: of the fraction of the budget that is used up and
of running accuracies per task.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hkvprof.testbed.generator import TASKS, ask_questions
from hkvprof.testbed.scenes import Scene, consecutive_labels, draw_scene, random_labels
from hkvprof.testbed.tasks import SceneQuestion

LOOKUP_STAGE_END = 0.55
"""Share of the budget spent on the four-layer look-up model, before it grows."""
ENTROPY_START = 0.78
"""From here on the entropy floor holds: late, as in the shipped checkpoint."""

_LOOKUP_TASKS = ("ocr", "list", "cell", "attr", "find", "count", "which", "kv", "diff")
_AGGREGATION_TASKS = tuple(name for name, task in TASKS.items() if task.is_aggregation)
_BOOST: dict[str, float] = {"top": 1.5, "majall": 1.5, "diff": 1.5, "count": 1.3, "nimg": 1.3}

Grid = tuple[int, int]
_SMALL: tuple[Grid, ...] = ((2, 4), (4, 4), (4, 4))
_MIDDLE: tuple[Grid, ...] = (*_SMALL, (4, 6))
_LARGE: tuple[Grid, ...] = (*_MIDDLE, (6, 6))


class Level(NamedTuple):
    """A step of the curriculum, in force until the fraction `until` of its stage at the latest."""

    until: float
    images: tuple[int, ...]
    grids: tuple[Grid, ...]


LOOKUP_LEVELS = (
    Level(0.12, (1,), ((2, 4),)),
    Level(0.24, (1, 2, 2), ((2, 4), (4, 4))),
    Level(0.33, (1, 2, 3, 3), ((2, 4), (4, 4))),
    Level(0.42, (2, 3, 4, 4), _MIDDLE),
    Level(0.52, (2, 4, 6, 6), _MIDDLE),
    Level(1.0, (2, 4, 6, 8, 8), _LARGE),
)
GROWN_LEVELS = (
    Level(0.12, (1, 1, 2, 2, 3), _SMALL),
    Level(0.3, (1, 2, 3, 4, 6), _MIDDLE),
    Level(0.55, (1, 2, 4, 6, 8, 8, 10), _LARGE),
    Level(1.0, (1, 2, 4, 8, 8, 12, 12, 16), _LARGE),
)


@dataclass
class RunningAccuracy:
    """Exponential means of whole-reply accuracy per task."""

    values: dict[str, float] = field(default_factory=dict)

    def update(self, task: str, accuracy: float, count: int) -> None:
        """Take in `count` replies; about 270 replies fill the mean."""
        keep = 0.97 ** (count / 8)
        self.values[task] = self.values.get(task, 0.0) * keep + accuracy * (1 - keep)

    def get(self, task: str) -> float:
        """0 for a task that was not seen."""
        return self.values.get(task, 0.0)


@dataclass
class Curriculum:
    """The level of the look-up stage; it rises by accuracy, or by time."""

    level: int = 0
    steps_on_level: int = 0

    def advance(self, stage_fraction: float, accuracy: RunningAccuracy) -> bool:
        """Count a step and rise if the level is learnt or over; returns whether it rose."""
        self.steps_on_level += 1
        last = self.level + 1 == len(LOOKUP_LEVELS)
        learnt = min(accuracy.get(task) for task in ("ocr", "list", "cell")) > 0.8
        if last or not (
            (learnt and self.steps_on_level > 100)
            or stage_fraction >= LOOKUP_LEVELS[self.level].until
        ):
            return False
        self.level += 1
        self.steps_on_level = 0
        accuracy.values.clear()
        return True


class StepPlan(NamedTuple):
    """The scenes and questions of one training step."""

    images: int
    grid: Grid
    facts: int
    questions: int
    tasks: tuple[str, ...]
    text_share: float
    highest_label: int

    def tokens(self) -> int:
        """Estimated length of a packed row."""
        cells = self.grid[0] * self.grid[1]
        return 2 + self.images * (cells + 5) + self.facts * 8 + self.questions * 14


def is_lookup_stage(fraction: float) -> bool:
    """Whether the four-layer model is still trained."""
    return fraction < LOOKUP_STAGE_END


def stage_fraction(fraction: float) -> float:
    """Progress within the current stage."""
    if is_lookup_stage(fraction):
        return fraction / LOOKUP_STAGE_END
    return (fraction - LOOKUP_STAGE_END) / (1 - LOOKUP_STAGE_END)


def learning_rate(fraction: float, steps_in_stage: int) -> float:
    """Factor on the base rates: constant, then from 45% of the grown stage on a cosine to 2%."""
    warm = min(1.0, (steps_in_stage + 1) / 40)
    if is_lookup_stage(fraction):
        return warm
    progress = max(0.0, (stage_fraction(fraction) - 0.45) / 0.55)
    return warm * 0.83 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def role_weight(fraction: float) -> float:
    """Weight of the auxiliary look-up heads: 1, then linearly to 0 in the grown stage."""
    if is_lookup_stage(fraction):
        return 1.0
    return min(1.0, max(0.0, 1 - (stage_fraction(fraction) - 0.5) / 0.25))


def sum_weight(fraction: float) -> float:
    """Weight of the auxiliary aggregation heads, which only the grown stage has."""
    if is_lookup_stage(fraction):
        return 0.0
    return min(1.0, max(0.0, 1 - (stage_fraction(fraction) - 0.6) / 0.25))


def task_odds(fraction: float, accuracy: RunningAccuracy) -> dict[str, float]:
    """Tasks are asked the more the less they are learnt."""
    odds = {task: min(1.0, max(0.12, 1.05 - accuracy.get(task))) for task in TASKS}
    boost = {"count": 0.5} if is_lookup_stage(fraction) else _BOOST
    return {task: odd * boost.get(task, 1.0) for task, odd in odds.items()}


def _plan_lookup(level: Level, accuracy: RunningAccuracy, rng: random.Random) -> StepPlan:
    if rng.random() < 0.18 and accuracy.get("kv") < 0.9:
        # Text facts need the same matching circuit as `find`, and are learnt last without this.
        facts = rng.randint(3, 8)
        return StepPlan(rng.choice((1, 2)), (2, 4), facts, facts, ("kv",), 0.45, 16)
    images, grid = rng.choice(level.images), rng.choice(level.grids)
    return StepPlan(images, grid, rng.randint(2, 5), 12, _LOOKUP_TASKS, 0.45, 16)


def _plan_grown(level: Level, rng: random.Random) -> StepPlan:
    highest = rng.choice((16, 32))
    if rng.random() < 0.25:
        images, grid = rng.choice((1, 2, 2, 3, 4)), rng.choice(_SMALL)
        return StepPlan(images, grid, 1, 15, _AGGREGATION_TASKS, 0.1, highest)
    images, grid = rng.choice(level.images), rng.choice(level.grids)
    if images > 8 and grid == (6, 6):
        grid = (4, 4)
    text_share = rng.choice((0.45, 0.3, 0.1))
    return StepPlan(images, grid, rng.randint(1, 4), 13, tuple(TASKS), text_share, highest)


def plan_step(
    fraction: float, curriculum: Curriculum, accuracy: RunningAccuracy, rng: random.Random
) -> StepPlan:
    """What one step is trained on."""
    if is_lookup_stage(fraction):
        return _plan_lookup(LOOKUP_LEVELS[curriculum.level], accuracy, rng)
    within = stage_fraction(fraction)
    level = next((level for level in GROWN_LEVELS if within < level.until), GROWN_LEVELS[-1])
    return _plan_grown(level, rng)


def draw_step(
    plan: StepPlan, tokens: int, odds: Mapping[str, float], rng: random.Random
) -> tuple[list[Scene], list[list[SceneQuestion]]]:
    """Scenes with questions for about `tokens` tokens; at least two rows."""
    scenes: list[Scene] = []
    asked: list[list[SceneQuestion]] = []
    while len(scenes) < max(2, tokens // plan.tokens()):
        if rng.random() < 0.2:
            labels = consecutive_labels(plan.images)
        else:
            labels = random_labels(plan.images, rng, plan.highest_label)
        scene = draw_scene(
            rng, labels, *plan.grid, plan.facts, plan.text_share, "diff" in plan.tasks
        )
        questions = ask_questions(scene, rng, plan.questions, dict(odds), plan.tasks)
        if questions:
            scenes.append(scene)
            asked.append(questions)
    return scenes, asked
