"""HybridKV's eleven benchmarks: where they lie, how they are read, what their score is.

    DATA_DIR/MileBench/<Task>/<Task>.json, images/    eight of its tasks, each a benchmark
    DATA_DIR/VATEX/                                   CIDEr
    DATA_DIR/NExT-OE/ (or NExT-QA/OE/)                WUPS
    DATA_DIR/Video-ChatGPT/                           a judge's score, 0 to 5

The layouts field by field: docs/reproduce.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hkvprof.errors import UsageError
from hkvprof.evaluate.datasets import milebench, videos
from hkvprof.evaluate.datasets.source import Layout

Figure = Literal["percent", "cider", "wups", "judge"]
IMAGES = "MileBench"
IMAGE_TASKS = 8
"""How many tasks of MileBench the paper averages."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its name, the folders it may lie in, its layout, and what its score is."""

    name: str
    places: tuple[str, ...]
    layout: Layout
    figure: Figure

    @property
    def slug(self) -> str:
        """The folder of its answers."""
        return self.name.lower().replace("/", "-")

    def folder(self, data: Path) -> Path | None:
        """Where it lies, if it does."""
        return next((data / place for place in self.places if (data / place).is_dir()), None)


VATEX = Benchmark("VATEX", ("VATEX", "vatex"), videos.VATEX_LAYOUT, "cider")
NEXT_OE = Benchmark("NExT-OE", ("NExT-OE", "NExT-QA", "nextqa"), videos.NEXTOE_LAYOUT, "wups")
VIDEO_CHATGPT = Benchmark(
    "Video-ChatGPT", ("Video-ChatGPT", "video-chatgpt"), videos.VIDEOCHATGPT_LAYOUT, "judge"
)


def image_benchmark(task: str) -> Benchmark:
    """One task of MileBench."""
    return Benchmark(f"{IMAGES}/{task}", (f"{IMAGES}/{task}",), milebench.PUBLISHED, "percent")


def all_benchmarks(data: Path, image_tasks: Sequence[str] = ()) -> list[Benchmark]:
    """The named tasks of MileBench (all that are there, if none is named), then the videos."""
    tasks = list(image_tasks) or _tasks_there(data / IMAGES)
    return [*map(image_benchmark, tasks), VATEX, NEXT_OE, VIDEO_CHATGPT]


def chosen(benchmarks: Sequence[Benchmark], only: Sequence[str]) -> list[Benchmark]:
    """Those named in `only`, by name or by the part after the slash. Raises UsageError."""
    known = {name: one for one in benchmarks for name in _names(one)}
    unknown = [name for name in only if name.lower() not in known]
    if unknown:
        raise UsageError(
            f"no benchmark {', '.join(unknown)}: expected some of "
            f"{', '.join(one.name for one in benchmarks)}"
        )
    wanted = {known[name.lower()].name for name in only}
    return [one for one in benchmarks if not only or one.name in wanted]


def _names(one: Benchmark) -> tuple[str, str]:
    lower = one.name.lower()
    return lower, lower.rpartition("/")[2]


def _tasks_there(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*/*.json") if file.stem == file.parent.name)
