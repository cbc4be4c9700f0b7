"""What is fuzzed: seeds, a mutant of them on disk, loading it, and using what was accepted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from rich.console import Console

from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.merge import merge
from hkvprof.calibration.rows import CONDITIONS, RowFolder
from hkvprof.errors import HkvError
from hkvprof.heads import HeadGrid
from hkvprof.profile.record import METADATA_KEY, Profile, load_profile
from hkvprof.report import summary, terminal
from tests.calibration.made_rows import CONDITIONS as MADE_CONDITIONS
from tests.calibration.made_rows import GRID, TYPES, make_row
from tests.fuzz import jsons, tensors
from tests.profiles import FOLDER, index_tables, make_profile, plain_profile, with_confidence

BUDGETS: tuple[float | int | str, ...] = (0.001, 0.05, 0.5, 1.0, 64, "1MiB", "3%")
TOKENS = (1, 13, 100, 4096, 10**6)


class Target(Protocol):
    """A kind of input."""

    def mutate(self, random: Random, folder: Path) -> None:
        """Write one mutant into the folder, which earlier ones may have used."""

    def load(self, folder: Path) -> Any:
        """What the loader makes of it. Raises HkvError."""

    def use(self, random: Random, loaded: Any) -> None:
        """Do with an accepted one what users do. Raises HkvError."""


class Profiles:
    """Profile files: the golden ones of all versions, and small ones of every recipe."""

    NAME = "mutant.safetensors"

    def __init__(self) -> None:
        tiny = HeadGrid(layers=1, query_heads=2, kv_heads=1, head_dim=4)
        golden = [path.read_bytes() for path in sorted(FOLDER.glob("profile-*.safetensors"))]
        made = [
            *(make_profile(recipe, tiny) for recipe in ("measured", "paper", "uniform")),
            plain_profile(make_profile(grid=tiny)),
            with_confidence(make_profile(grid=tiny)),
            with_confidence(make_profile("paper")),
        ]
        self.seeds = [*golden, *(profile.to_bytes() for profile in made)]

    def mutate(self, random: Random, folder: Path) -> None:
        """Change one of the seeds."""
        data = tensors.mutated(random, random.choice(self.seeds), METADATA_KEY)
        (folder / self.NAME).write_bytes(data)

    def load(self, folder: Path) -> Profile:
        """As every command does."""
        return load_profile(folder / self.NAME)

    def use(self, random: Random, loaded: Any) -> None:
        """Plan a few budgets, draw it, write it again."""
        for _ in range(2):
            budget, tokens = random.choice(BUDGETS), random.choice(TOKENS)
            _tolerant(lambda b=budget, t=tokens: loaded.allocation(b, t, rows=2))
            _tolerant(lambda b=budget, t=tokens: loaded.plan(b, t, rows=3))
        drawn = terminal.overview(loaded, random.choice(TOKENS), random.random() < 0.5)
        _check_drawn(drawn)
        _check_drawn(terminal.layer_page(loaded, 0, True))
        json.dumps(summary.summarise(loaded, 4096), allow_nan=False)
        json.dumps(summary.summarise_layer(loaded, 0), allow_nan=False)
        loaded.to_bytes()


class Rows:
    """Folders of measured rows, with conditions and index tables."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        rows = RowFolder(home, MADE_CONDITIONS)
        for number in range(3):
            rows.add(make_row(number, "ocr", TYPES))
        rows.keep_tables(FittedTables(index_tables(GRID)), "digest")
        self.seeds = {path.name: path.read_bytes() for path in sorted(home.iterdir())}
        shutil.rmtree(home)

    def mutate(self, random: Random, folder: Path) -> None:
        """Change one of the files, another than that of the mutant before."""
        for name, data in self.seeds.items():
            (folder / name).write_bytes(data)
        name = random.choice(list(self.seeds))
        if name == CONDITIONS:
            value = jsons.mutated(random, json.loads(self.seeds[name]))
            made = jsons.text_of(random, value).encode("utf-8", "surrogatepass")
        else:
            made = tensors.mutated(random, self.seeds[name], "hkvprof_row")
        (folder / name).write_bytes(made)

    def load(self, folder: Path) -> Any:
        """Read, check and merge them, as `hkvprof merge` does."""
        return merge([folder])

    def use(self, random: Random, loaded: Any) -> None:
        """The profile that came of them."""
        _check_drawn(terminal.overview(loaded, 4096, True))
        loaded.to_bytes()


def _tolerant(action: Callable[[], Any]) -> None:
    """A budget that is too small for a profile is no failure."""
    try:
        action()
    except HkvError as error:
        check_message(error)


def _check_drawn(page: Any) -> None:
    """Nothing that a terminal would obey, and nothing that cannot be written as UTF-8."""
    screen = io.StringIO()
    Console(file=screen, width=200, no_color=True, highlight=False, markup=False).print(page)
    _check_plain(screen.getvalue())


def check_message(error: HkvError) -> None:
    """What is printed of an error: not megabytes, and nothing that a terminal would obey."""
    text = " ".join(str(error).split())
    assert len(text) < 3000, f"the message has {len(text)} characters: {text[:200]}"
    text.encode("utf-8")
    _check_plain(text)


def _check_plain(text: str) -> None:
    for line in text.splitlines():
        bad = [c for c in line if ord(c) < 32 or 0x7F <= ord(c) < 0xA0]
        assert not bad, f"control characters {bad[:5]!r} in {line[:200]!r}"
    text.encode("utf-8")


@dataclass(frozen=True)
class Case:
    """One mutant, named by what makes it again."""

    target: str
    seed: int
    number: int

    def random(self) -> Random:
        """The source of all its chances."""
        return Random(f"{self.target}:{self.seed}:{self.number}")

    def __str__(self) -> str:
        return f"{self.target}-{self.seed}-{self.number}"
