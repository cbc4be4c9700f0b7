"""Planning for one prompt length: nothing is promised that was not measured."""

from __future__ import annotations

import numpy as np
import pytest

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.planning import Menu, plan_anew

RATIOS = np.array([0.01, 0.05, 0.1, 0.3, 1.0], dtype=np.float32)
STATIC = Strategy(HeadType.STATIC)


def curves(heads: int) -> np.ndarray:
    """One strategy; head i loses i times as much, all the same below 5%."""
    shape = np.array([1.0, 1.0, 0.5, 0.1, 0.0])
    return (np.arange(1, heads + 1)[:, None] * shape).astype(np.float32)[None, None]


@pytest.mark.parametrize("tokens", [1_000, 32_768, 1_000_000])
@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_no_head_falls_below_the_first_measured_ratio(tokens: int, share: float) -> None:
    menu = Menu((STATIC,), KeepRule(2, 4, 16), 64, tokens, 2)
    ratio = plan_anew(menu, curves(8), RATIOS, share).ratio
    assert ratio.min() >= np.float32(0.01) * (1 - 1e-6)
    assert ratio.astype(float).mean() <= share + 1e-9


def test_a_budget_below_the_first_ratio_is_shared_evenly() -> None:
    menu = Menu((STATIC,), KeepRule(2, 4, 16), 64, 32_768, 2)
    ratio = plan_anew(menu, curves(8), RATIOS, 0.004).ratio
    assert np.allclose(ratio, 0.004)


def test_on_short_prompts_the_floor_in_tokens_decides() -> None:
    menu = Menu((STATIC,), KeepRule(2, 4, 16), 64, 200, 2)
    ratio = plan_anew(menu, curves(8), RATIOS, 0.06).ratio
    assert ratio.min() >= 7 / 200
