"""The registry of tasks, and what the functions that ask questions share."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from hkvprof.testbed.scenes import FEATURES, Scene


@dataclass(frozen=True)
class Question:
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


Ask = Callable[[Scene, random.Random], Question | None]


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
