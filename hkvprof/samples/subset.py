"""Which samples of a large set are taken: balanced over tasks, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest


def choose(names: Sequence[tuple[str, str]], count: int, seed: int) -> list[int]:
    """Positions of `count` of the (task, id) pairs, balanced over tasks, ascending.

    Every task's ids are ordered by a hash of seed, task and id, and tasks take turns.
    """
    by_task: dict[str, list[int]] = {}
    ranked = sorted(range(len(names)), key=lambda i: _rank(seed, *names[i]))
    for position in ranked:
        by_task.setdefault(names[position][0], []).append(position)
    tasks = sorted(by_task, key=lambda task: _rank(seed, task))
    turns = zip_longest(*(by_task[task] for task in tasks))
    taken = [position for turn in turns for position in turn if position is not None]
    return sorted(taken[:count])


def _rank(seed: int, *names: str) -> str:
    text = json.dumps([seed, *names])
    return hashlib.sha256(text.encode("utf-8")).hexdigest() + text
