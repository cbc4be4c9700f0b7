"""What an engine that is measured is told, and what it answers. Knows nothing of vLLM."""

from __future__ import annotations

import random
from dataclasses import dataclass

MARK = "FIGURES "
"""What a line of output begins with that is an answer; others are vLLM's."""


@dataclass(frozen=True)
class Crowd:
    """Requests that are all there from the beginning: `shared` of the `tokens` tokens of each
    prompt are the same in all, and in crowds of other seeds.

    Tokens are random, where no prompts are `given`: what is measured does not depend on what they
    say.
    """

    requests: int
    tokens: int
    new_tokens: int
    shared: int = 0
    seed: int = 1
    given: tuple[tuple[int, ...], ...] = ()

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """The given ones, or random token numbers, the shared ones first."""
        if self.given:
            return [list(one) for one in self.given]
        common, draw = random.Random(0), random.Random(self.seed)
        numbers = [common.randrange(vocabulary) for _ in range(self.shared)]
        own = self.tokens - self.shared
        return [
            numbers + [draw.randrange(vocabulary) for _ in range(own)] for _ in range(self.requests)
        ]


@dataclass(frozen=True)
class Served:
    """What serving a crowd took; `most` and `mean` requests ran at once, each of which `held` so
    many blocks in the mean of all steps; `cached` of the prompts' tokens came from the prefix
    cache. CPU seconds are those of the process. `said` are replies to prompts that were given."""

    steps: int
    most: int
    mean: float
    tokens_out: int
    cached: int
    cpu_seconds: float
    wall_seconds: float
    compaction_seconds: float
    preemptions: int
    held: float
    said: list[list[int]]
