"""How many tokens a share of a head's dense bytes buys, everything counted (plain integers)."""

from __future__ import annotations

from dataclasses import dataclass

from hkvprof.heads import HeadType, KeepRule, Strategy

SLOT_BYTES = 4
"""Bytes of the device-side slot map per hot item (int32 item number)."""
SCORE_BYTES = 4
"""More of them where scores are smoothed over steps (float32)."""
END_BYTES = 8
"""Bytes per segment, one (batch row, KV head): where it starts and ends (int32 each)."""
CENTROIDS = 256
"""Values of a one-byte code of the projected index (policy.quantiser)."""
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


def static_tokens(ratio: float, tokens: int, keep: KeepRule) -> int:
    """Tokens a static head keeps of `tokens`: floor(ratio * tokens), at least sinks and recent."""
    return min(tokens, max(int(ratio * tokens + 1e-6), keep.sinks + keep.recent))


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


def table_bytes(head_dim: int, channels: int) -> int:
    """Device bytes of one head's projected-index tables, as float32 (policy.index.HeadTables).

    Projections of queries and keys, the keys' mean, the codebook.
    """
    return 4 * (2 * head_dim * channels + head_dim + CENTROIDS * channels)


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
    hot = int(left // (strategy.chunk * unit + slot_bytes))
    if items < 1 or hot < 1:
        return None
    return DynamicLayout(keep.sinks, recent, items, strategy.chunk, min(hot, items))


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
        return static_tokens(ratio, tokens, keep) * unit + END_BYTES
    layout = dynamic_layout(strategy, ratio, tokens, keep, head_dim, itemsize, slot_bytes)
    layout = layout or least_layout(strategy, tokens, keep)
    index = layout.items * index_item_bytes(strategy, head_dim, itemsize)
    return layout.resident_tokens * unit + index + layout.hot * slot_bytes + END_BYTES
