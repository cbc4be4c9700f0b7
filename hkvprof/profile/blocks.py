"""Plans for an engine that keeps whole blocks of tokens: how many blocks every head keeps.

An engine such as vLLM hands out memory in blocks, and all heads of a group share a block table, so
that groups of equal size keep equal pages. Which head belongs to which group is decided once; how
many blocks a group keeps is a function of the prompt's length alone. Numpy only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError
from hkvprof.heads import EXACT_BITS, HeadGrid, KeepRule, Strategy
from hkvprof.profile.budgets import Budget
from hkvprof.profile.dealing import allocate, losses_of
from hkvprof.profile.grouping import HeadGroups, LoneHeads
from hkvprof.profile.pages import PageFormat
from hkvprof.profile.planning import loss_between

if TYPE_CHECKING:
    from hkvprof.profile.record import Profile

MIN_TOKENS = 256
"""Prompts shorter than this stay dense, as in the transformers runtime."""
MOST_GROUPS = 16
"""Groups of heads at most: every one has a block table and costs time in every step."""
SLACK = 0.05
"""What groups may lose more than heads that are planned one by one, as a share of that loss."""


@dataclass(frozen=True)
class Blocks:
    """What the groups keep of one prompt: `dropped` whole blocks at its start are freed.

    A group's heads hold `kept_tokens`, all but sinks and recent ones in `bits` bits, where its
    blocks and the prompt's last, incomplete one have room for them; a group that frees nothing is
    whole. `kept_bytes` are those of all heads, `dense_bytes` what they would be whole.
    `dense_reason` says why nothing is freed.
    """

    tokens: int
    dropped: tuple[int, ...]
    bits: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    kept_bytes: int
    dense_bytes: int
    expected_loss: float
    dense_reason: str = ""

    @property
    def share(self) -> float:
        """The share of dense bytes that is kept."""
        return self.kept_bytes / max(1, self.dense_bytes)

    @property
    def frees(self) -> bool:
        """Whether any group frees a block."""
        return any(self.dropped)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Heads in groups of equal size, and curves of what a group loses.

    `group` and `strategy` are [layers, kv_heads]; heads of a group have residents in equal `bits`.
    `curves` float32 [lengths, groups, ratios] sum the losses of a group's heads under their
    strategies. Elements have `itemsize` bytes. Plans of equal content are equal.
    """

    grid: HeadGrid
    share: float
    block_size: int
    itemsize: int
    even: float
    keep: KeepRule
    strategies: tuple[Strategy, ...]
    group: NDArray[np.int64]
    strategy: NDArray[np.int64]
    lengths: NDArray[np.int64]
    ratios: NDArray[np.float32]
    curves: NDArray[np.float32]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self.group.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides."""
        told = (self.grid, self.share, self.block_size, self.itemsize, self.even, self.keep)
        total = hashlib.sha256(repr((*told, self.strategies)).encode())
        for array in (self.group, self.strategy, self.lengths, self.ratios, self.curves):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def head(self, layer: int, head: int) -> Strategy:
        """The strategy of one head."""
        return self.strategies[int(self.strategy[layer, head])]

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """The bits of every group's residents."""
        first = np.unique(self.group, return_index=True)[1]
        own = self.strategy.reshape(-1)[first].tolist()
        return tuple(self.strategies[number].resident_bits for number in own)

    @cached_property
    def pages(self) -> tuple[PageFormat, ...]:
        """What the pages of every group hold."""
        size, dim = self.block_size, self.grid.head_dim
        return tuple(PageFormat(bits, size, dim, self.itemsize) for bits in self.bits)

    def at(self, tokens: int, share: float | None = None) -> Blocks:
        """What a prompt of `tokens` tokens keeps.

        A `share` of its own changes how many blocks the groups keep, not which heads are in them.
        """
        plan = self if share is None or share == self.share else _under(self, share)
        return _blocks(plan, tokens)


@lru_cache(maxsize=256)
def _under(plan: BlockPlan, share: float) -> BlockPlan:
    return replace(plan, share=share)


@lru_cache(maxsize=4096)
def _blocks(plan: BlockPlan, tokens: int) -> Blocks:
    size, groups, pages = plan.block_size, plan.groups, plan.pages
    full, tail = divmod(tokens, size)
    kept, reason = np.full(groups, full), ""
    room = math.floor((plan.share * tokens - tail) * groups / size + 1e-6)
    least = _blocks_for([page.least_slots(plan.keep) for page in pages], tail, size)
    if plan.share >= 1:
        reason = "the budget is 1.0"
    elif tokens < MIN_TOKENS:
        reason = f"prompt of {tokens} tokens is shorter than {MIN_TOKENS}"
    elif room < least.sum():
        reason = f"{room} blocks for {groups} groups do not hold sinks and recent tokens"
    else:
        wanted = _ratios(plan, tokens) * tokens - tail
        most = _blocks_for([page.enough(tokens, plan.keep) for page in pages], tail, size)
        most = np.where(wanted < full * size, np.clip(most, least, full), full)
        kept = _rounded(wanted, size, least, most, room)
    return _told(plan, tokens, kept, reason)


def _blocks_for(slots: list[int], tail: int, size: int) -> NDArray[np.int64]:
    """Whole blocks that have so many slots with a prompt's last, incomplete one of `tail`."""
    return np.maximum(0, -(-(np.array(slots, dtype=np.int64) - tail) // size))


def _told(plan: BlockPlan, tokens: int, kept: NDArray[np.int64], reason: str) -> Blocks:
    full, tail = divmod(tokens, plan.block_size)
    held, token_bytes = kept * plan.block_size + tail, plan.grid.token_bytes(plan.itemsize)
    frees = [
        (page, slots, slots < tokens) for page, slots in zip(plan.pages, held.tolist(), strict=True)
    ]
    return Blocks(
        tokens=tokens,
        dropped=tuple((full - kept).tolist()),
        bits=tuple(page.bits if less else EXACT_BITS for page, _, less in frees),
        kept_tokens=tuple(
            page.tokens(slots, tokens, plan.keep) if less else tokens for page, slots, less in frees
        ),
        kept_bytes=int(held.sum()) * token_bytes // plan.groups,
        dense_bytes=tokens * token_bytes,
        expected_loss=_loss(plan, tokens, held / max(1, tokens)),
        dense_reason=reason,
    )


def _curves(plan: BlockPlan, tokens: int) -> NDArray[np.float32]:
    """[1, 1, groups, ratios]: the losses of groups as if each were one head with one strategy."""
    return loss_between(plan.curves, plan.lengths, tokens)[None, None]


def _ratios(plan: BlockPlan, tokens: int) -> NDArray[np.float64]:
    """The share that each group gets before rounding."""
    loss, ratios = _curves(plan, tokens), plan.ratios
    floor = max(plan.keep.floor_tokens / tokens, min(float(ratios[0]), plan.share))
    floor = min(floor, plan.share)
    if floor < ratios[0]:
        ratios = np.concatenate([[np.float32(floor)], ratios])
        loss = np.concatenate([loss[..., :1], loss], axis=-1)
    dealt = allocate(loss, ratios, plan.share, floor, plan.even)
    return dealt.ratio.reshape(-1).astype(np.float64)


def _rounded(
    wanted: NDArray[np.float64],
    size: int,
    least: NDArray[np.int64],
    most: NDArray[np.int64],
    room: int,
) -> NDArray[np.int64]:
    """Whole blocks, `room` of them at most: what is left over goes to the largest remainders, then
    to all alike."""
    exact = np.clip(wanted / size, least, most)
    kept = np.floor(exact + 1e-6).astype(np.int64)
    while kept.sum() > room:
        kept[int(np.argmax(np.where(kept > least, kept - exact, -np.inf)))] -= 1
    order = np.argsort(-(exact - kept), kind="stable")
    while kept.sum() < room and (kept < most).any():
        more = order[kept[order] < most[order]][: room - kept.sum()]
        kept[more] += 1
    return kept


def _loss(plan: BlockPlan, tokens: int, ratio: NDArray[np.float64]) -> float:
    none = np.zeros((1, len(ratio)), dtype=np.uint8)
    at = np.clip(ratio, float(plan.ratios[0]), 1).astype(np.float32)[None]
    return float(losses_of(_curves(plan, tokens), plan.ratios, none, at).sum())


def plan_blocks(
    profile: Profile, budget: float | int | str | Budget, block_size: int, itemsize: int = 2
) -> BlockPlan:
    """Group the heads of a profile for blocks of `block_size` tokens under a budget in shares.

    Heads are static, scored by the window and without a text prior, whatever else the menu has;
    `itemsize` are bytes per element of what is not in fewer bits. Groups are cut from heads in the
    order of what they would get by themselves, and each has the bits in which it then loses least;
    there are as few of them as lose no more than SLACK. Raises BudgetError.
    """
    share = Budget.parse(budget).share
    if share is None:
        raise BudgetError(
            f"budget {budget!r} for blocks must be a share of dense bytes such as 0.2 or '20%': a "
            "block table is planned for requests of every length"
        )
    heads = LoneHeads.of(profile, share)
    plans = [
        _planned(profile, share, block_size, itemsize, heads.cut(size))
        for size in _sizes(profile.grid.total, share)
    ]
    lost = [sum(_loss_of_shares(plan, n) for n in plan.lengths.tolist()) for plan in plans]
    finest = min(lost)
    return next(p for p, one in zip(plans, lost, strict=True) if one <= (1 + SLACK) * finest)


def _sizes(heads: int, share: float) -> list[int]:
    """Sizes that divide the heads into equal groups, the fewest groups first."""
    if share >= 1:
        return [heads]
    return [heads // n for n in range(1, min(heads, MOST_GROUPS) + 1) if heads % n == 0]


def _planned(
    profile: Profile, share: float, block_size: int, itemsize: int, groups: HeadGroups
) -> BlockPlan:
    return BlockPlan(
        grid=profile.grid,
        share=share,
        block_size=block_size,
        itemsize=itemsize,
        even=profile.rules.even,
        keep=profile.keep,
        strategies=profile.strategies,
        group=groups.group,
        strategy=groups.strategy,
        lengths=profile.lengths,
        ratios=profile.ratios,
        curves=groups.curves,
    )


def _loss_of_shares(plan: BlockPlan, tokens: int) -> float:
    """What the groups lose before their shares are rounded to blocks."""
    if plan.share >= 1 or plan.share * tokens < plan.keep.floor_tokens:
        return 0.0
    return _loss(plan, tokens, _ratios(plan, tokens))
