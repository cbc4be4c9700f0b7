"""What can be done with a head of a prompt of some length, and what fits."""

from __future__ import annotations

from dataclasses import dataclass

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.policy.budget import token_floor
from hkvprof.policy.costs import DynamicLayout, dynamic_layout


@dataclass(frozen=True)
class Menu:
    """Strategies for prompts of `tokens` tokens with `itemsize` bytes per K/V element."""

    strategies: tuple[Strategy, ...]
    keep: KeepRule
    head_dim: int
    tokens: int
    itemsize: int

    @property
    def floor(self) -> float:
        """The least ratio of any head."""
        return token_floor(self.keep.floor_tokens, self.tokens)

    def fits(self, strategy: Strategy, ratio: float) -> bool:
        """Whether the strategy's fixed bytes leave room for tokens at `ratio`."""
        if strategy.head_type is HeadType.STATIC:
            return True
        return self.layout(strategy, ratio) is not None

    def layout(self, strategy: Strategy, ratio: float) -> DynamicLayout | None:
        """How a dynamic strategy divides the prompt at `ratio`; None if it does not fit."""
        return dynamic_layout(strategy, ratio, self.tokens, self.keep, self.head_dim, self.itemsize)
