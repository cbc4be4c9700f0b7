"""A request's own budget, and how the workers learn of it.

`sampling_params.extra_args["hkvprof_budget"]` (over HTTP `vllm_xargs`) is a share of the prompt's
dense bytes. Which row of a step asks for which share is what vLLM tells logits processors, so that
one which changes no logits keeps the list.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hkvprof.engines.vllm.seams import LogitsProcessor, VLLMValidationError, process_dict_updates
from hkvprof.errors import HkvError, UsageError
from hkvprof.profile.budgets import Budget

ARGUMENT = "hkvprof_budget"
ROWS: dict[int, dict[int, float]] = {}
"""By the id of an engine's configuration: shares by row of the step, of rows that ask for one."""


def own_share(params: Any) -> float | None:
    """The share that sampling parameters ask for; None where they do not. Raises HkvError."""
    given = (getattr(params, "extra_args", None) or {}).get(ARGUMENT)
    if given is None:
        return None
    share = Budget.parse(given).share
    if share is None:
        raise UsageError(
            f"{ARGUMENT} must be a share of dense bytes such as 0.2, or 1.0 to keep everything, "
            f"found {given!r}"
        )
    return share


class RowBudgets(LogitsProcessor):
    """Keeps ROWS up to date; logits stay as they are."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises VLLMValidationError (HTTP 400) for a budget that is not understood."""
        try:
            own_share(sampling_params)
        except HkvError as error:
            raise VLLMValidationError(str(error)) from error

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.shares = ROWS.setdefault(id(vllm_config), {})
        self.shares.clear()

    def apply(self, logits: Tensor) -> Tensor:
        """The same logits, unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """True: vLLM need not call `apply` for greedy requests."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows that came, went or moved since the last step."""
        process_dict_updates(self.shares, batch_update, lambda params, *rest: own_share(params))
