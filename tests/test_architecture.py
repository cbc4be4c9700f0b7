"""docs/architecture.md says what is there: all rooms, and names on the three ways; the glossary."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], maxsplit=1, flags=re.M)[0]


def steps(title: str) -> list[str]:
    """The numbered lines of a section, each with its continuation."""
    return re.findall(r"^\d+\. .*(?:\n   .*)*", section(title), flags=re.M)


def resolve(dotted: str) -> Any:
    """What `room.module.Class.method` of hkvprof names. Raises ImportError or AttributeError."""
    parts = f"hkvprof.{dotted}".split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            thing = getattr(thing, name)
        return thing
    raise ImportError(dotted)


WAYS = ("A sample's way", "A request's way", "A decoding step's way")


@pytest.mark.parametrize("title", WAYS)
def test_every_step_names_functions_that_exist(title: str) -> None:
    numbered = steps(title)
    assert len(numbered) >= 4
    for number, step in enumerate(numbered, start=1):
        assert step.startswith(f"{number}. "), step
        names = re.findall(r"`([\w.]+)`", step)
        assert names, f"step {number} of {title} names no function"
        for name in names:
            assert callable(resolve(name)), name


def test_every_room_is_on_the_page() -> None:
    package = ROOT / "hkvprof"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}
    told = set(re.findall(r"`(\w+)/?`", section("The rooms")))
    assert rooms <= told, f"docs/architecture.md lacks {sorted(rooms - told)}"


def test_the_glossary_has_every_word_once_and_in_order() -> None:
    words = re.findall(r"^\| ([\w-]+(?: [\w-]+)*) \|", GLOSSARY, flags=re.M)[1:]
    assert len(words) > 30
    assert words == sorted(set(words))
