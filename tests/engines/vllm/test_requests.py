"""Requests' own budgets: read strictly, and found in the row that vLLM moved a request to."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hkvprof.errors import HkvError

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"
)


def params(budget: object = None) -> Any:
    return SimpleNamespace(extra_args=None if budget is None else {"hkvprof_budget": budget})


def test_budgets_are_shares_or_absent() -> None:
    from hkvprof.engines.vllm.requests import own_share

    assert own_share(None) is None
    assert own_share(params()) is None
    assert own_share(SimpleNamespace(extra_args={"other": 1})) is None
    assert [own_share(params(one)) for one in (0.2, "20%", 1.0, "1.0")] == [0.2, 0.2, 1.0, 1.0]


@pytest.mark.parametrize("budget", [0, -1, 4096, "2GiB", "much", True, [0.2], float("nan")])
def test_others_are_refused_with_the_request(budget: object) -> None:
    from vllm.exceptions import VLLMValidationError

    from hkvprof.engines.vllm.requests import RowBudgets, own_share

    with pytest.raises(HkvError):
        own_share(params(budget))
    with pytest.raises(VLLMValidationError):
        RowBudgets.validate_params(params(budget))


def test_shares_follow_the_rows_of_the_batch() -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from hkvprof.engines.vllm.requests import ROWS, RowBudgets

    config = SimpleNamespace()
    made = RowBudgets(config, "cpu", False)
    rows = ROWS[id(config)]
    added = [(0, params(0.1), [], []), (1, params(), [], []), (2, params(1.0), [], [])]
    made.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert rows == {0: 0.1, 2: 1.0}
    swap = [(0, 1, MoveDirectionality.SWAP)]
    made.update_state(BatchUpdate(3, removed=[], added=[], moved=swap))
    assert rows == {1: 0.1, 2: 1.0}
    last = [(2, 1, MoveDirectionality.UNIDIRECTIONAL)]
    made.update_state(BatchUpdate(2, removed=[1], added=[], moved=last))
    made.update_state(None)
    assert rows == {1: 1.0}
    made.update_state(BatchUpdate(2, removed=[], added=[(1, params(), [], [])], moved=[]))
    assert rows == {}
    logits = torch.randn(2, 5)
    assert made.apply(logits) is logits
    assert made.is_argmax_invariant()
    ROWS.pop(id(config))
