"""The record of how a calibration measures and decides."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.merge import measured_by, merge
from hkvprof.calibration.recipe import KAPPAS, MEASURED_MENU, Recipe
from hkvprof.calibration.rows import Conditions, RowFolder
from hkvprof.errors import UsageError
from hkvprof.heads import KeepRule
from tests.calibration.made_rows import CONDITIONS, GRID, make_rows
from tests.profiles import fingerprint, index_tables

RECIPES = [
    Recipe(),
    Recipe(replies="own", keep=KeepRule(1, 2, 8)),
    Recipe("paper", keep=KeepRule(), chunk=32, text_prior=0.25),
]


def test_a_recipe_says_what_is_measured() -> None:
    assert Recipe().strategies == MEASURED_MENU
    assert Recipe().index_sizes == (16, 32, 64)
    paper = Recipe("paper", kappa=0.3)
    assert (paper.kappas, paper.ratios, paper.index_sizes) == ((*KAPPAS, 0.3), (1.0,), ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"theta": 0.8, "kappa": 0.2}, "kappa, theta belong to recipe 'paper'"),
        ({"name": "paper", "replies": "own"}, "judges no replies"),
        ({"even": 0.5}, "three quarters of a budget"),
        ({"transfer_weight": 1.0}, "what a step reads is said where a budget is"),
    ],
    ids=str,
)
def test_what_a_recipe_does_not_ask_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(**options)


def test_what_is_decided_later_is_known_by_name() -> None:
    assert Recipe().decided == []
    assert Recipe("paper", budget=0.2, theta=0.8, kappa=0.2, seed=3).decided == ["budget", "theta"]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_conditions_tell_the_recipe_that_they_are_of(recipe: Recipe) -> None:
    conditions = Conditions.of(fingerprint(GRID), "float32", recipe)
    measured = Conditions.from_json(conditions.to_json()).measured_by
    assert replace(measured, keep=recipe.keep) == recipe
    assert measured.keep_rule == recipe.keep_rule


def test_rows_are_merged_by_the_recipe_that_measured_them(tmp_path: Path) -> None:
    folder = RowFolder(tmp_path, CONDITIONS)
    folder.keep_tables(FittedTables(index_tables(GRID)), "these")
    for row in make_rows({"a": 2}):
        folder.add(row)
    recipe = replace(measured_by(tmp_path), budget=0.3)
    assert merge([tmp_path], recipe).default_budget == 0.3
    for other, word in (
        (Recipe("paper", keep=recipe.keep), "name 'measured'"),
        (Recipe(), "keep_rule KeepRule"),
        (replace(recipe, replies="own"), "replies 'given'"),
    ):
        with pytest.raises(UsageError, match=word):
            merge([tmp_path], other)


def test_a_recipe_is_made_without_torch() -> None:
    code = "import hkvprof, sys; hkvprof.Recipe(budget=0.2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
