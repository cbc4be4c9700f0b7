"""What is said of a profile whose own prompts are too short for its default budget."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.cli.calibrate import announce
from hkvprof.errors import BudgetError
from hkvprof.profile.record import Profile
from hkvprof.report.summary import reach, summarise, unserved
from hkvprof.report.terminal import overview
from tests.models_for_tests import random_llama
from tests.profiles import make_profile


@pytest.fixture(scope="module")
def short() -> Profile:
    """All heads dynamic at 10%, made of prompts of 273 tokens and more."""
    profile = uniform_profile(random_llama(), "dynamic", budget=0.1, chunk=16)
    return replace(profile, provenance={"tokens": {"min": 273, "mean": 300.0, "max": 380}})


def test_the_shortest_prompt_is_said(short: Profile) -> None:
    found = reach(short)
    assert found.shortest is not None
    assert found.needed is not None
    short.allocation(0.1, found.shortest)
    with pytest.raises(BudgetError):
        short.allocation(0.1, found.shortest - 1)
    short.allocation(found.needed, 273)
    text = unserved(short)
    assert f"serves prompts of {found.shortest:,} tokens and more" in text
    assert "the shortest calibrated one has 273" in text
    assert f"a budget of {100 * found.needed:.3g}%" in text
    page = Console(file=io.StringIO(), width=400)
    page.print(overview(short, 4096, ascii_only=True))
    assert text in page.file.getvalue()  # type: ignore[attr-defined]
    assert summarise(short, 4096)["shortest_prompt"] == found.shortest


def test_nothing_is_said_where_all_are_served(short: Profile) -> None:
    assert unserved(replace(short, default_budget=0.5)) == ""
    assert unserved(make_profile()) == ""


def test_calibrate_says_it(
    short: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for profile, says in ((short, True), (replace(short, default_budget=0.5), False)):
        announce(profile, profile.save(tmp_path / "made.safetensors"))
        assert ("Note: The default budget" in capsys.readouterr().out) == says
