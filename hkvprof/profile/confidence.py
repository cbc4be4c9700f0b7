"""How sure a profile is, as a record: what stands in its provenance under "confidence"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from hkvprof.profile.bounds import ProvenanceReader

KEY = "confidence"
"""Where the record stands in a profile's provenance."""
_READ = ProvenanceReader(KEY, "calibrate or merge")

MEASURES = {"types": 0.0, "kappa": -1.0, "jaccard": 0.0, "ratios": -1.0, "curves": -1.0}
"""What is compared, and the least value of each; the most is 1.

Share of heads with equal types; Cohen's kappa of the types; Jaccard index of the static sets;
Spearman's correlation over heads of the planned ratios, and of the least loss at the default
budget (of the sparsity that decides, where no losses were measured).
"""

Heads = tuple[tuple[float, ...], ...]
"""One figure per [layer][KV head]."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% bootstrap interval, which holds it."""

    value: float
    low: float
    high: float

    @classmethod
    def rounded(cls, value: float, low: float, high: float) -> Interval:
        """The three figures rounded to four digits."""
        return cls(*(round(float(x), 4) + 0.0 for x in (value, low, high)))


@dataclass(frozen=True)
class Comparison:
    """Agreement of two profiles of different samples, by MEASURES; empty with a `reason`.

    A mean over `repeats` pairs; intervals from `resamples` resamples, clustered by task.
    """

    figures: Mapping[str, Interval] = field(default_factory=dict)
    repeats: int = 0
    resamples: int = 0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse of `from_json`."""
        if self.reason:
            return {"reason": self.reason}
        figures = {name: [f.value, f.low, f.high] for name, f in self.figures.items()}
        return {**figures, "repeats": self.repeats, "resamples": self.resamples}

    @classmethod
    def from_json(cls, data: Any, name: str) -> Comparison:
        """Build from a stranger's JSON, checked. Raises ProfileError."""
        data = _READ.mapping(data, name)
        if "reason" in data:
            return cls(reason=_READ.text(data["reason"], f"{name}.reason", 1))
        figures = {}
        for measure, least in MEASURES.items():
            entry = data.get(measure)
            if not isinstance(entry, list) or len(entry) != 3:
                raise _READ.wrong(f"{name}.{measure}", "three numbers (value, low, high)", entry)
            value, low, high = (_READ.number(x, f"{name}.{measure}", least, 1) for x in entry)
            if not low <= value <= high:
                raise _READ.wrong(f"{name}.{measure}", "low <= value <= high", entry)
            figures[measure] = Interval(value, low, high)
        repeats, resamples = (
            _READ.count(data.get(key), f"{name}.{key}") for key in ("repeats", "resamples")
        )
        return cls(figures, repeats, resamples)


@dataclass(frozen=True)
class Confidence:
    """How sure a profile of `samples` samples is; nothing else is filled with a `reason`.

    - `agree`, `low`, `high` [layer][KV head]: the share of samples that alone would give the head
      the profile's type, and its Wilson interval (confidence.assess says what it means).
    - `halves`: profiles of two random halves. `tasks`: that of one task alone against that of all
      others, mean over tasks; `by_task` the same for each, without intervals. `kinds`: that of
      prompts of text alone against that of prompts with images or video.
    """

    samples: int
    reason: str = ""
    agree: Heads = ()
    low: Heads = ()
    high: Heads = ()
    halves: Comparison = field(default_factory=Comparison)
    tasks: Comparison = field(default_factory=Comparison)
    by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kinds: Comparison = field(default_factory=Comparison)

    @property
    def flips(self) -> Heads:
        """[layer][KV head]: the share of samples that alone would give the other type."""
        return tuple(tuple(round(1 - share, 4) for share in layer) for layer in self.agree)

    @property
    def flip_rate(self) -> float:
        """Mean of `flips` over all heads; 0 where there are none."""
        return (
            round(fmean(share for layer in self.flips for share in layer), 4) if self.agree else 0
        )

    @property
    def worst_task(self) -> str:
        """The task whose profile agrees least with that of the others; "" where none is compared.

        By the share of equal types, then Jaccard, then ratios, then name.
        """

        def rank(task: str) -> tuple[float, float, float, str]:
            found = self.by_task[task]
            return found["types"], found["jaccard"], found["ratios"], task

        return min(self.by_task, key=rank, default="")

    def least_sure(self, most: int) -> list[tuple[int, int]]:
        """(layer, head) of the heads on which fewest samples agree, all of those below 1."""
        heads = [
            (share, layer, head)
            for layer, shares in enumerate(self.agree)
            for head, share in enumerate(shares)
            if share < 1
        ]
        return [(layer, head) for _, layer, head in sorted(heads)[:most]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse of `from_json`."""
        if self.reason:
            return {"samples": self.samples, "reason": self.reason}
        return {
            "samples": self.samples,
            "heads": {name: _lists(getattr(self, name)) for name in ("agree", "low", "high")},
            "flip_rate": self.flip_rate,
            "halves": self.halves.to_json(),
            "tasks": self.tasks.to_json(),
            "by_task": {task: dict(found) for task, found in self.by_task.items()},
            "worst_task": self.worst_task,
            "kinds": self.kinds.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, shape: tuple[int, int]) -> Confidence:
        """Build from JSON, checked for a profile of (layers, KV heads). Raises ProfileError."""
        data = _READ.mapping(data, KEY)
        samples = _READ.count(data.get("samples"), f"{KEY}.samples")
        if "reason" in data:
            return cls(samples, _READ.text(data["reason"], f"{KEY}.reason", 1))
        heads = _READ.mapping(data.get("heads"), "heads")
        by_task = _READ.mapping(data.get("by_task"), "by_task")
        return cls(
            samples,
            agree=_heads(heads.get("agree"), "agree", shape),
            low=_heads(heads.get("low"), "low", shape),
            high=_heads(heads.get("high"), "high", shape),
            halves=Comparison.from_json(data.get("halves"), "halves"),
            tasks=Comparison.from_json(data.get("tasks"), "tasks"),
            by_task={task: _measures(found, task) for task, found in by_task.items()},
            kinds=Comparison.from_json(data.get("kinds"), "kinds"),
        )


def _lists(heads: Heads) -> list[list[float]]:
    return [list(layer) for layer in heads]


def _measures(data: Any, task: str) -> dict[str, float]:
    found = _READ.mapping(data, f"by_task.{task}")
    return {
        name: _READ.number(found.get(name), f"by_task.{task}.{name}", least, 1)
        for name, least in MEASURES.items()
    }


def _heads(data: Any, name: str, shape: tuple[int, int]) -> Heads:
    layers, heads = shape
    rows = data if isinstance(data, list) else []
    if len(rows) != layers or any(not isinstance(r, list) or len(r) != heads for r in rows):
        raise _READ.wrong(f"heads.{name}", f"{layers} lists of {heads} numbers", data)
    return tuple(tuple(_READ.number(x, f"heads.{name}", 0, 1) for x in row) for row in rows)
