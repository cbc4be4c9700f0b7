"""Budgets of `hkvprof eval` that go by a name."""

from __future__ import annotations

import pytest

from hkvprof.cli.evaluate import LADDERS, _budgets
from hkvprof.errors import BudgetError, UsageError


def test_ladders_stand_for_their_budgets_beside_others() -> None:
    assert _budgets("halves") == ("0.5", "0.25", "0.125", "0.0625")
    assert _budgets("0.4, tenths") == ("0.4", "0.20", "0.10", "0.05", "0.03", "0.02")
    assert len(_budgets("halves,tenths")) == sum(map(len, LADDERS.values()))
    with pytest.raises(BudgetError, match="names a budget twice"):
        _budgets("halves,0.25")
    with pytest.raises(UsageError, match="--budget is empty"):
        _budgets(",")
