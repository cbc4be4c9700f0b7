"""Costs: what a strategy holds and reads at a share of a head's dense bytes, in tokens and bytes.

Plain integers. Layouts of single heads (static, dynamic), a menu of strategies at one prompt
length, and what a budget is worth to a request that grows (Worth).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hkvprof.heads import EXACT_BITS, HeadType, KeepRule, Strategy

SLOT_BYTES = 4
"""Bytes of the device-side slot map per hot item (int32 item number)."""
SCORE_BYTES = 4
"""More of them where scores are smoothed over steps (float32)."""
END_BYTES = 8
"""Bytes per segment, one (batch row, KV head): where it starts and ends (int32 each)."""
QUANTISED_END_BYTES = 12
"""More per segment with tokens in fewer bits: its number, where they start and end (int32 each)."""
SCALE_GROUP = 32
"""Most channels that share a scale where tokens are kept in 4 bits."""
CENTROIDS = 256
"""Values of a one-byte code of the projected index (selection.quantiser)."""
TOO_SHORT = "static (row too short for its index)"
"""What a dynamic head is called whose prompt leaves no room for index and hot items."""


@dataclass(frozen=True)
class DynamicLayout:
    """How a dynamic head's prompt of `tokens` tokens is divided.

    The first `sinks` and the last `recent` tokens stay resident; between them lie `items` chunks of
    `chunk` tokens in host memory, of which `hot` have a resident copy.
    """

    sinks: int
    recent: int
    items: int
    chunk: int
    hot: int

    @property
    def resident_tokens(self) -> int:
        """Tokens with K/V on the device: sinks, recent and the hot buffer."""
        return self.sinks + self.recent + self.hot * self.chunk


def scale_group(bits: int, head_dim: int) -> int:
    """Channels of a token's key (or value) that share a scale: all of them in 8 bits; in 4 the
    largest power of two that divides the width, at most SCALE_GROUP."""
    return head_dim if bits == 8 else min(SCALE_GROUP, head_dim & -head_dim)


def quantised_bytes(bits: int, head_dim: int) -> int:
    """Device bytes of a token's key and value in so many bits, with their scales (float16)."""
    return 2 * (head_dim * bits // 8 + 2 * (head_dim // scale_group(bits, head_dim)))


@dataclass(frozen=True)
class StaticLayout:
    """Tokens that a static head keeps: `exact` in the model's dtype, `quantised` in fewer bits."""

    exact: int
    quantised: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens it keeps."""
        return self.exact + self.quantised


def static_layout(
    strategy: Strategy, ratio: float, tokens: int, keep: KeepRule, head_dim: int, itemsize: int
) -> StaticLayout:
    """What a static head keeps of `tokens` for `ratio` of its dense bytes.

    With residents in fewer bits sinks and recent tokens alone stay exact; the mean of the others
    (keys and values, in the model's dtype) comes out of the share.
    """
    exact = min(tokens, keep.sinks + keep.recent)
    if strategy.resident_bits == EXACT_BITS:
        return StaticLayout(static_tokens(ratio, tokens, keep))
    unit = 2 * head_dim * itemsize
    left = ratio * tokens * unit - (exact + 1) * unit
    room = math.floor(left / quantised_bytes(strategy.resident_bits, head_dim) + 1e-6)
    return StaticLayout(exact, max(0, min(tokens - exact, room)))


def static_bytes(strategy: Strategy, layout: StaticLayout, head_dim: int, itemsize: int) -> int:
    """Device bytes of a static head's tokens and of what goes with them."""
    unit = 2 * head_dim * itemsize
    if not layout.quantised:
        return layout.exact * unit
    row = quantised_bytes(strategy.resident_bits, head_dim)
    return (layout.exact + 1) * unit + layout.quantised * row + QUANTISED_END_BYTES


def static_tokens(ratio: float, tokens: int, keep: KeepRule) -> int:
    """Tokens a static head keeps of `tokens`: floor(ratio * tokens), at least sinks and recent."""
    return min(tokens, max(int(ratio * tokens + 1e-6), keep.sinks + keep.recent))


def token_floor(floor_tokens: int, tokens: int) -> float:
    """The least ratio at which a prompt of `tokens` holds `floor_tokens`; 1 when it cannot."""
    return min(1.0, floor_tokens / max(tokens, 1) + 1e-9) if tokens else math.inf


def index_item_bytes(strategy: Strategy, head_dim: int, itemsize: int) -> int:
    """Device bytes that the index spends on one item (a chunk, or a token when `chunk` is 1)."""
    match strategy.index:
        case "mean":
            return head_dim * itemsize
        case "minmax":
            return 2 * head_dim * itemsize
        case "projected":
            return strategy.bits // 8
    raise AssertionError(f"no index named {strategy.index!r}")


def position_bytes(axes: int) -> int:
    """Device bytes of a token's positions (int32), which all heads and layers share, where an index
    goes by positions on several axes (selection.rotary)."""
    return 4 * axes


def table_bytes(head_dim: int, channels: int, pairs: int = 0) -> int:
    """Device bytes of one head's projected-index tables, as float32 (selection.index.HeadTables).

    Projections of queries and keys, the keys' mean, the codebook; six numbers for each of `pairs`
    rotary pairs of a bias (selection.rotary.RotatingBias).
    """
    return 4 * (2 * head_dim * channels + head_dim + CENTROIDS * channels + 6 * pairs)


def centres_bytes(group: int, centres: int, head_dim: int, pairs: int) -> int:
    """Device bytes of the queries that a calibrated score asks of one KV head, as float32: per
    query head of its group a centre and a weight each; the frequencies of rotary pairs."""
    return 4 * (group * centres * (head_dim + 1) + pairs)


def dynamic_layout(
    strategy: Strategy,
    ratio: float,
    tokens: int,
    keep: KeepRule,
    head_dim: int,
    itemsize: int,
    slot_bytes: int = SLOT_BYTES,
) -> DynamicLayout | None:
    """The layout a dynamic head gets for `ratio` of its dense bytes, or None if nothing is left.

    Index and slot map (`slot_bytes` per hot item) come out of the share. The chunked region starts
    after the sinks; what does not fill a chunk joins the recent tokens.
    """
    assert strategy.head_type is HeadType.DYNAMIC
    items, recent = _chunked(strategy, tokens, keep)
    unit = 2 * head_dim * itemsize
    left = ratio * tokens * unit - (keep.sinks + recent) * unit
    left -= items * index_item_bytes(strategy, head_dim, itemsize)
    slot = strategy.chunk * unit
    if strategy.resident_bits != EXACT_BITS:
        slot = strategy.chunk * quantised_bytes(strategy.resident_bits, head_dim)
        left -= unit  # their mean
    hot = int(left // (slot + slot_bytes))
    if items < 1 or hot < 1:
        return None
    return DynamicLayout(keep.sinks, recent, items, strategy.chunk, min(hot, items))


def dynamic_bytes(
    strategy: Strategy, layout: DynamicLayout, head_dim: int, itemsize: int, slot_bytes: int
) -> int:
    """Device bytes of a dynamic head: tokens, index, and `slot_bytes` per hot item."""
    unit = 2 * head_dim * itemsize
    total = (layout.sinks + layout.recent) * unit + layout.hot * slot_bytes
    total += layout.items * index_item_bytes(strategy, head_dim, itemsize)
    hot = layout.hot * layout.chunk
    if strategy.resident_bits == EXACT_BITS:
        return total + hot * unit
    row = quantised_bytes(strategy.resident_bits, head_dim)
    return total + unit + hot * row + QUANTISED_END_BYTES


def least_layout(strategy: Strategy, tokens: int, keep: KeepRule) -> DynamicLayout:
    """All full chunks on the host and one hot item: what a dynamic head needs at least."""
    items, recent = _chunked(strategy, tokens, keep)
    return DynamicLayout(keep.sinks, recent, items, strategy.chunk, 1)


def _chunked(strategy: Strategy, tokens: int, keep: KeepRule) -> tuple[int, int]:
    """Full chunks between sinks and recent tokens, and recent tokens with what fills no chunk."""
    items = max(0, tokens - keep.sinks - keep.recent) // strategy.chunk
    return items, tokens - keep.sinks - items * strategy.chunk


def held_bytes(
    strategy: Strategy,
    ratio: float,
    tokens: int,
    keep: KeepRule,
    head_dim: int,
    itemsize: int,
    slot_bytes: int,
) -> int:
    """Device bytes of a head that was compressed again at `tokens` tokens (runtime.packing)."""
    unit = 2 * head_dim * itemsize
    if ratio >= 1:
        return tokens * unit + END_BYTES
    if strategy.head_type is HeadType.STATIC:
        kept = static_layout(strategy, ratio, tokens, keep, head_dim, itemsize)
        return static_bytes(strategy, kept, head_dim, itemsize) + END_BYTES
    layout = dynamic_layout(strategy, ratio, tokens, keep, head_dim, itemsize, slot_bytes)
    layout = layout or least_layout(strategy, tokens, keep)
    return dynamic_bytes(strategy, layout, head_dim, itemsize, slot_bytes) + END_BYTES


OVER = 0.05
"""What may be held over the budget, as a share of it."""
LEAST = 128
"""Where the budget is worth fewer tokens per head, the same share of this many: 6.4 tokens."""
RESERVE = 1 / 16
"""Most of the budget that a later compression leaves free for tokens to come."""
LEAST_ROOM = 4
"""Tokens between two compressions at least, also where indexes alone exceed the budget."""
QUIET = 1 << 30
"""Tokens without an end."""


@dataclass(frozen=True)
class Worth:
    """What a budget is worth: `now`, and `slope` more with every further token of the row."""

    now: float
    slope: float = 0.0

    def at(self, tokens: int) -> float:
        """The budget's worth after so many more tokens."""
        return self.now + self.slope * tokens

    def limit(self, tokens: int) -> float:
        """The most that may be held after so many more tokens."""
        return self.at(tokens) + OVER * max(self.at(tokens), LEAST)

    def room(self, held: float, every: int) -> int:
        """Tokens that may come, at most `every`, where `held` are held now.

        After n of them held + n <= limit(n), unless so much is held that not even LEAST_ROOM fits.
        """
        relative = _steps((1 + OVER) * self.now - held, 1 - (1 + OVER) * self.slope)
        absolute = _steps(self.now + OVER * LEAST - held, 1 - self.slope)
        return min(every, max(LEAST_ROOM, relative, absolute))

    def spare(self, held: float, tokens: int) -> int:
        """Tokens for which there may be memory after so many, without waiting for the budget to
        grow."""
        return max(0, math.floor(self.limit(tokens) - held - tokens + 1e-9))

    def target(self, every: int) -> float:
        """What a later compression should leave held at most, so that `every` tokens have room; it
        takes no more than RESERVE of the budget for them."""
        return max((1 - RESERVE) * self.now, self.limit(every) - every)


def _steps(left: float, each: float) -> int:
    if left < -1e-9:
        return 0
    return QUIET if each <= 0 else min(QUIET, math.floor(left / each + 1e-9))


TURNOVER = 0.2
"""Part of the hot items that are new in a step, in the mean: 16% to 24% at the default smoothing
(docs/retrieval.md)."""
FRESH = 0.25
"""Part of the hot items that may be new in any step, at least, where a budget limits reads."""
BURST = 0.5
"""The same where the knee is the budget: hardly a step wants more."""


def candidates(rerank: int, layout: DynamicLayout) -> int:
    """Keys that reranking reads from the host per step: of items that are not hot."""
    return min(rerank, layout.items - layout.hot)


def fresh_items(layout: DynamicLayout, part: float) -> int:
    """Items that this part of the hot ones comes to, at least one: no more than could be new."""
    return min(max(1, math.ceil(part * layout.hot - 1e-9)), layout.items - layout.hot)


def read_bytes(
    rerank: int, layout: DynamicLayout, key_bytes: int, value_bytes: int, fresh: float
) -> float:
    """Bytes that a dynamic head reads from host memory in a step in which `fresh` items become hot.

    `key_bytes` and `value_bytes` are those of one token there. Keys of candidates, then keys and
    values of items that become hot: never more than are not hot.
    """
    items = min(fresh, layout.hot, layout.items - layout.hot)
    keys = candidates(rerank, layout)
    return layout.chunk * (keys * key_bytes + items * (key_bytes + value_bytes))


def most_read_bytes(rerank: int, chunk: int, key_bytes: int, value_bytes: int, fresh: int) -> int:
    """Bytes that no step reads more of, however long the row becomes: a bound of `read_bytes`."""
    return chunk * (rerank * key_bytes + fresh * (key_bytes + value_bytes))


def host_row_bytes(head_dim: int, itemsize: int, int8: bool) -> int:
    """Bytes of one token's key, or of its value, in host memory."""
    return quantised_bytes(8, head_dim) // 2 if int8 else head_dim * itemsize


@dataclass(frozen=True)
class Menu:
    """Strategies for prompts of `tokens` tokens with `itemsize` bytes per K/V element.

    With `int8_host` items in host memory have 8 bits.
    """

    strategies: tuple[Strategy, ...]
    keep: KeepRule
    head_dim: int
    tokens: int
    itemsize: int
    int8_host: bool = False

    @property
    def floor(self) -> float:
        """The least ratio of any head."""
        return token_floor(self.keep.floor_tokens, self.tokens)

    @property
    def dense_bytes(self) -> int:
        """Bytes of a head's dense keys and values."""
        return 2 * self.head_dim * self.itemsize * self.tokens

    @property
    def host_bytes(self) -> int:
        """Bytes of one token's key, or of its value, in host memory."""
        return host_row_bytes(self.head_dim, self.itemsize, self.int8_host)

    def fits(self, strategy: Strategy, ratio: float) -> bool:
        """Whether the strategy's fixed bytes leave room for tokens at `ratio`."""
        if strategy.head_type is HeadType.STATIC:
            return True
        return self.layout(strategy, ratio) is not None

    def layout(self, strategy: Strategy, ratio: float) -> DynamicLayout | None:
        """How a dynamic strategy divides the prompt at `ratio`; None if it does not fit."""
        return dynamic_layout(strategy, ratio, self.tokens, self.keep, self.head_dim, self.itemsize)

    def reading(self, strategy: Strategy, ratio: float) -> DynamicLayout | None:
        """The layout of a head that reads from the host; None for static heads, for those whose
        index leaves no room at this ratio, and for those that hold everything."""
        if strategy.head_type is HeadType.STATIC or ratio >= 1:
            return None
        layout = self.layout(strategy, ratio)
        return layout if layout is not None and layout.hot < layout.items else None


@dataclass(frozen=True)
class Reads:
    """What heads read from the host per decoding step, over the bytes of their dense K/V.

    `expected` in the mean, and `worst` with as many new items as they hold; a limited plan has to
    have room for `limit`, with FRESH of the hot ones, which does not grow with the row.
    """

    expected: float = 0.0
    limit: float = 0.0
    worst: float = 0.0


def fetched_share(menu: Menu, strategy: Strategy, ratio: float) -> Reads:
    """What a head reads per decoding step at `ratio`."""
    layout = menu.reading(strategy, ratio)
    if layout is None:
        return Reads()
    sizes = (menu.host_bytes, menu.host_bytes)
    expected, worst = (
        read_bytes(strategy.rerank, layout, *sizes, fresh)
        for fresh in (TURNOVER * layout.hot, layout.hot)
    )
    fresh = fresh_items(layout, FRESH)
    limit = most_read_bytes(strategy.rerank, layout.chunk, *sizes, fresh)
    return Reads(expected / menu.dense_bytes, limit / menu.dense_bytes, worst / menu.dense_bytes)
