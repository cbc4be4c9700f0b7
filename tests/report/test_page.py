"""The report in HTML: its parts, its size, and that what strangers wrote stays text."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hkvprof.errors import UsageError
from hkvprof.profile.record import Profile, load_profile
from hkvprof.report import page as pages
from hkvprof.report.figures import figures
from tests.profiles import (
    GOLDEN,
    GOLDEN_V1,
    GOLDEN_V2,
    GOLDEN_V3,
    make_profile,
    plain_profile,
    with_certificate,
)

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Tags(HTMLParser):
    """All tags with their attributes, and the text of every script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def drawn(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Tags(text).scripts[0])
    return found


@pytest.mark.parametrize("path", [GOLDEN, GOLDEN_V3, GOLDEN_V2, GOLDEN_V1])
def test_every_schema_version_has_a_report(path: Path) -> None:
    profile = load_profile(path)
    found = drawn(pages.page(profile, path.name))
    assert len(found["types"]) == profile.grid.layers
    has_statistics = any("Drift" in one["title"] for one in found["query_maps"])
    assert has_statistics is (profile.statistics is not None)


@pytest.mark.parametrize("recipe", ["measured", "paper", "uniform"])
def test_a_profile_that_says_little_has_a_report(recipe: str) -> None:
    profile = replace(plain_profile(make_profile()), recipe=recipe, statistics=None, provenance={})
    text = pages.page(profile, "p.safetensors")
    assert (drawn(text)["curves"] is None) is not profile.has_curves
    assert "`hkvprof certify` was not run on it" in text
    assert "not recorded" in text


def test_the_grid_of_plans_is_what_planning_says() -> None:
    profile = load_profile("profiles/tinyvl.hkv.safetensors")
    plans = figures(profile)["plans"]
    assert plans["fetches"][:2] == ["knee", "0"]
    for number, budget in enumerate(plans["budgets"]):
        for cell, fetch in zip(plans["cells"][number], plans["fetches"], strict=True):
            if "error" in cell:
                assert "too small" in cell["error"] or "raise" in cell["error"]
                continue
            plan = profile.plan(
                budget, profile.usual_tokens, fetch=None if fetch == "knee" else fetch
            )
            assert (cell["resident"], cell["most"]) == (plan.resident_bytes, plan.most_read_bytes)
            assert cell["kinds"].count("s") / profile.grid.total == pytest.approx(plan.static_share)
    assert sum("error" not in cell for row in plans["cells"] for cell in row) > 50


def test_what_strangers_wrote_is_no_markup() -> None:
    profile = replace(make_profile(), provenance={})
    evil: Profile = replace(
        profile,
        fingerprint=replace(profile.fingerprint, hub_id=EVIL, commit=EVIL),
        provenance={"data": EVIL, "versions": {EVIL: EVIL}, "tasks": {EVIL: 3}},
    )
    honest, found = (Tags(pages.page(one, name)) for one, name in ((profile, "p"), (evil, EVIL)))
    assert found.scripts == honest.scripts
    assert [tag for tag, _ in found.tags if tag in ("img", "script")] == ["script"] * 2
    assert not any(name.startswith("on") for _, given in found.tags for name in given)


def test_nothing_is_loaded_and_no_other_script_may_run() -> None:
    text = pages.page(with_certificate(make_profile()), "p")
    tags = Tags(text).tags
    assert not any({"src", "href"} & given.keys() for _, given in tags)
    policy = next(given["content"] for tag, given in tags if "http-equiv" in given)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy
    assert "Certificate" in text


def test_a_page_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = make_profile()
    assert len(pages.page(profile, "p").encode()) < 100_000
    monkeypatch.setattr(pages, "MOST_BYTES", 10_000)
    with pytest.raises(UsageError, match="expected at most 10,000: leave --eval out"):
        pages.page(profile, "p")
