"""A model with a profile applied, and the account of what a harness asked of it. No harness."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hkvprof.artifact import Profile, load_profile
from hkvprof.errors import BudgetError
from hkvprof.models.load import load_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.plugins.arguments import Arguments, refuse_processes
from hkvprof.plugins.counting import Counts
from hkvprof.policy.budget import Budget
from hkvprof.runtime.early import without_weights
from hkvprof.runtime.handle import Handle, apply
from hkvprof.runtime.receipt import Receipt

_LOG = logging.getLogger(__name__)


class Session:
    """`model` compresses all it generates.

    `counts` are the requests of all calls so far, `latest` those of the latest call.
    """

    def __init__(self, arguments: Arguments) -> None:
        """Load and hook the model. Raises HkvError as load_model, load_profile and apply do."""
        refuse_processes()
        given = arguments.profile
        self.profile = given if isinstance(given, Profile) else load_profile(str(given))
        self.budget = Budget.parse(arguments.runtime.get("budget", self.profile.default_budget))
        self.min_tokens = int(arguments.runtime["min_tokens"])
        self.model: Any
        self.processor: ChatProcessor
        without_weights(arguments.pretrained, self.profile)
        self.model, self.processor = load_model(arguments.pretrained, **arguments.loading)
        self.handle: Handle = apply(self.model, self.profile, **arguments.runtime)
        self.counts = Counts()
        self.latest = Counts()

    @property
    def full(self) -> bool:
        """Whether the budget is the whole cache, so that nothing is compressed on purpose."""
        return self.budget.share is not None and self.budget.share >= 1

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Account for one call of a harness.

        At its end CompressionError is raised if the budget is below 1 and none of its requests was
        compressed. A BudgetError tells about `min_tokens`.
        """
        self.latest = Counts()
        try:
            yield
        except BudgetError as error:
            raise BudgetError(
                f"{error}; or set min_tokens in --model_args (now {self.min_tokens}): shorter "
                "prompts stay dense and are counted as such"
            ) from error
        self.counts.merge(self.latest)
        if self.full:
            return
        self.latest.require(name)
        _LOG.log(
            logging.WARNING if self.latest.dense else logging.INFO, "%s: %s", name, self.latest
        )

    def foresee(self, lengths: Iterable[int]) -> None:
        """Raise BudgetError now if one of these prompts is too short for the budget.

        Long prompts run first, so that it would come at the end of a run otherwise.
        """
        due = [tokens for tokens in lengths if tokens >= self.min_tokens]
        if due and not self.full:
            self.profile.allocation(self.budget, min(due), self.model.dtype.itemsize)

    def count(self, receipt: Receipt, requests: int) -> None:
        """Note the requests that one cache served."""
        self.latest.add(receipt, requests)

    def close(self) -> None:
        """Give the model back as it was and forget it; the counts stay."""
        self.handle.detach()
        del self.model, self.handle

    def to_json(self) -> dict[str, Any]:
        """What belongs into a results file."""
        return {
            "budget": str(self.budget),
            "min_tokens": self.min_tokens,
            **self.counts.to_json(),
        }
