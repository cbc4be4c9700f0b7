"""Pages: all in the nav, every link and anchor leads somewhere, and README's figures are measured.

What mkdocs itself makes of them, `make docs` tells (strict).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import hkvprof
from hkvprof import runtime
from hkvprof.cli import app
from tools import site

ROOT = Path(__file__).parents[1]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "profiles/README.md"]
PAGES = [*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 900
FENCED = re.compile(r"^```.*?^```", flags=re.M | re.S)


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def anchors(page: str) -> set[str]:
    """Anchors of a page's headings; a heading that is there again gets a number, as on GitHub."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", text(page)), flags=re.M):
        name = site.anchor(heading, "-")
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


def navigated(entry: Any) -> Iterator[str]:
    """The pages below an entry of the nav."""
    if isinstance(entry, str):
        yield entry
        return
    for child in entry.values() if isinstance(entry, dict) else entry:
        yield from navigated(child)


def wrong_links(page: str, content: str) -> Iterator[str]:
    for target in site.links(content):
        path, mark, place = target.partition("#")
        if ":" in target:
            continue
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        if not (ROOT / there).exists():
            yield f"{page}: {target}: there is no {there}"
        elif mark and place not in anchors(there):
            yield f"{page}: {target}: {there} has no such heading"
        elif path and page != "README.md" and site.site_path(there) is None:
            yield f"{page}: {target}: the site has no {there} (tools/site.py, BROUGHT)"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_leads_somewhere(page: str) -> None:
    assert not list(wrong_links(page, text(page)))


def test_links_that_lead_nowhere_are_found() -> None:
    page = "[a](nowhere.md) [b](method.md#nothing) [c](../hkvprof/heads.py) `[d](x.md)` [e](#f)"
    assert [line.split(": ")[1] for line in wrong_links("docs/method.md", page)] == [
        "nowhere.md", "method.md#nothing", "../hkvprof/heads.py", "#f",
    ]  # fmt: skip


def test_every_page_is_in_the_nav_once() -> None:
    nav = yaml.safe_load(text("mkdocs.yml"))["nav"]
    listed = list(navigated(nav))
    brought = [there for there in site.BROUGHT.values() if there.endswith(".md")]
    own = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*own, *brought])


@pytest.mark.parametrize(
    ("heading", "name"),
    [("Will it fit?", "will-it-fit"), ("`min_tokens`", "min_tokens"), ("A - b", "a---b")],
)
def test_anchors_are_those_of_github(heading: str, name: str) -> None:
    assert site.anchor(heading) == name


def test_links_are_turned_for_the_site() -> None:
    readme = site.turned(
        "[a](docs/method.md#how) ![b](docs/x.svg) [c](LICENSE) [d](#e)", "README.md"
    )
    assert readme == "[a](method.md#how) ![b](x.svg) [c](LICENSE) [d](#e)"
    assert site.turned("[a](../SECURITY.md)", "docs/serving.md") == "[a](SECURITY.md)"
    assert site.turned("[a](../profiles/README.md)", "docs/serving.md") == "[a](profiles.md)"
    assert site.turned("[a](https://x.y/z.md)", "README.md") == "[a](https://x.y/z.md)"


def test_a_notebook_becomes_a_page() -> None:
    told = {"output_type": "stream", "name": "stdout", "text": ["7\n"]}
    noise = {"output_type": "stream", "name": "stderr", "text": ["warned\n"]}
    drawn = {"output_type": "display_data", "data": {"image/png": "AA==\n", "text/plain": "<F>"}}
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": ["f()"], "outputs": [told, noise, drawn]},
    ]
    page = site.shown({"cells": cells})
    assert page.startswith("# A\nb\n\n```python\nf()\n```\n\n```text\n7\n```\n\n<img")
    assert 'src="data:image/png;base64,AA=="' in page
    assert "warned" not in page
    assert "<F>" not in page


def test_help_of_every_verb_is_on_the_site() -> None:
    page = site.verbs()
    for command in app.registered_commands:
        assert f"\n## {command.name}\n\n```text\nUsage: hkvprof {command.name} " in f"\n{page}"
    assert site.HELP_MARK in text("docs/command-line.md")


def test_the_reference_has_every_public_name() -> None:
    told = set(re.findall(r"^::: hkvprof\.([\w.]+)$", text("docs/reference.md"), flags=re.M))
    public = set(hkvprof.__all__) - {"__version__"}
    more = {f"runtime.{name}" for name in set(runtime.__all__) - public}
    assert told == public | more | {"errors"}


def test_readme_is_short_and_names_the_test_command() -> None:
    page = text("README.md")
    assert len(page.split()) <= MOST_WORDS
    assert "make test " in page
    assert "pip install hkvprof" in page


def test_the_figures_of_readme_are_those_that_were_measured() -> None:
    """Each row's figures stand on one line, or in the paragraph, of docs/measured.md."""
    table = re.search(r"^\| at 5% .*?\n\n", text("README.md"), flags=re.M | re.S)
    assert table is not None
    figures = re.findall(r"\d+\.\d+", table[0])
    assert len(figures) >= 10
    measured = text("docs/measured.md")
    assert not [figure for figure in figures if figure not in measured]
