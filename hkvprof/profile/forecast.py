"""Forecasts: what the heads of a plan will hold and lose, in tokens and bytes, without a model.

The figures are those of the runtime's receipt after a prompt, with its default options: computed
from the same layouts (profile.costs), compared with real caches in tests/runtime/test_forecast.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import UsageError
from hkvprof.heads import HeadType, Strategy
from hkvprof.profile.budgets import Allocation
from hkvprof.profile.costs import (
    END_BYTES,
    SCORE_BYTES,
    SLOT_BYTES,
    TOO_SHORT,
    TURNOVER,
    DynamicLayout,
    dynamic_bytes,
    dynamic_layout,
    read_bytes,
    static_bytes,
    static_layout,
)
from hkvprof.profile.planning import Menu, poorest_loss

WHOLE = "whole"
"""Strategy and kind of a head that keeps every token, as the receipt calls it."""


@dataclass(frozen=True)
class HeadForecast:
    """One KV head: `kind` is static, dynamic or whole; bytes are those of all rows.

    `ratio` is its share of its dense bytes, `resident_tokens` the tokens per row with K/V on the
    device (hot copies included), `resident_bytes` K/V, index and slot map, `host_bytes` the items
    in host memory. `table_bytes` are loaded once per model; `loss` is NaN where not measured. A
    decoding step is expected to read `read_bytes` from the host, and reads at most
    `most_read_bytes`.
    """

    kind: str
    strategy: str
    ratio: float
    resident_tokens: int
    resident_bytes: int
    host_bytes: int
    table_bytes: int
    loss: float
    read_bytes: float = 0.0
    most_read_bytes: int = 0


@dataclass(frozen=True)
class LayerForecast:
    """What a layer will hold: its KV heads and their sums."""

    heads: tuple[HeadForecast, ...]

    @property
    def resident_bytes(self) -> int:
        """Request bytes on the device, all rows."""
        return sum(head.resident_bytes for head in self.heads)

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory, all rows."""
        return sum(head.host_bytes for head in self.heads)

    @property
    def table_bytes(self) -> int:
        """Device bytes of the tables that the layer's strategies need."""
        return sum(head.table_bytes for head in self.heads)

    @property
    def loss(self) -> float:
        """Expected loss; NaN where a head's is."""
        return sum(head.loss for head in self.heads)


@dataclass(frozen=True)
class Forecast:
    """What a profile's heads will hold and lose at one budget.

    It is for `rows` prompts of `tokens` tokens each. `share` is the budget as a share of dense
    bytes, `itemsize` bytes per K/V element. `position_bytes` (at most) are of positions that all
    heads share. `loss` is what planning minimises (docs/method.md),
    `reference_loss` that of a cache of `least_share`, the least that was measured, with static
    heads alone (planning.poorest_loss).
    """

    share: float
    tokens: int
    rows: int
    itemsize: int
    dense_bytes: int
    layers: tuple[LayerForecast, ...]
    least_share: float
    reference_loss: float | None
    position_bytes: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether every head keeps everything: the runtime then leaves the cache as it is."""
        return all(head.kind == WHOLE for head in self._heads())

    @property
    def resident_bytes(self) -> int:
        """What the requests hold on the device after the prompt (Receipt.resident_bytes)."""
        return self.position_bytes + sum(layer.resident_bytes for layer in self.layers)

    @property
    def host_bytes(self) -> int:
        """What they hold in host memory (Receipt.host_bytes)."""
        return sum(layer.host_bytes for layer in self.layers)

    @property
    def table_bytes(self) -> int:
        """Tables on the device, once per model (Receipt.shared_bytes)."""
        return sum(layer.table_bytes for layer in self.layers)

    @property
    def static_share(self) -> float:
        """Share of heads that are pruned once, and never read."""
        kinds = [head.kind for head in self._heads()]
        return kinds.count("static") / len(kinds)

    @property
    def read_bytes(self) -> float:
        """What a decoding step of all rows is expected to read from the host."""
        return sum(head.read_bytes for head in self._heads())

    @property
    def most_read_bytes(self) -> int:
        """The most that any decoding step reads (Receipt.most_read_bytes)."""
        return sum(head.most_read_bytes for head in self._heads())

    @property
    def read_share(self) -> float:
        """Expected reads per step over dense bytes."""
        return self.read_bytes / self.dense_bytes

    @property
    def most_read_share(self) -> float:
        """The most that a step reads over dense bytes: what a budget of reads bounds."""
        return self.most_read_bytes / self.dense_bytes

    @property
    def device_bytes(self) -> int:
        """Resident bytes and tables together."""
        return self.resident_bytes + self.table_bytes

    @property
    def peak_bytes(self) -> int:
        """Most device bytes at once, tables included (Receipt.peak_bytes and shared_bytes).

        While the last layer is compressed, its dense K/V lie beside everything that is kept.
        """
        layer = 0 if self.is_dense else self.dense_bytes // len(self.layers)
        return self.device_bytes + layer

    @property
    def resident_share(self) -> float:
        """Resident bytes over dense bytes."""
        return self.resident_bytes / self.dense_bytes

    @property
    def expected_loss(self) -> float | None:
        """Sum over heads; None where nothing was measured."""
        total = sum(layer.loss for layer in self.layers)
        return None if math.isnan(total) else total

    @property
    def relative_loss(self) -> float | None:
        """`expected_loss` over `reference_loss`: 0 loses nothing, 1 as much as the reference."""
        if self.expected_loss is None or not self.reference_loss:
            return None
        return self.expected_loss / self.reference_loss

    @property
    def below_measured(self) -> int:
        """Heads that keep less than the least measured share: their loss is at least what is said.

        The runtime rounds ratios down to float32; that much does not count.
        """
        return sum(head.ratio < self.least_share * (1 - 1e-6) for head in self._heads())

    def to_json(self, with_layers: bool = True) -> dict[str, Any]:
        """A JSON-ready dict; a loss that was not measured is None."""
        sums = ("resident_bytes", "host_bytes", "table_bytes")
        record: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "share", "tokens", "rows", "itemsize", "dense_bytes", *sums, "device_bytes",
                "peak_bytes", "read_bytes", "most_read_bytes", "read_share",
                "most_read_share", "static_share", "resident_share", "is_dense", "expected_loss",
                "relative_loss", "reference_loss", "least_share", "below_measured",
            )
        }  # fmt: skip
        if with_layers:
            record["layers"] = [
                {
                    **{name: getattr(layer, name) for name in sums},
                    "loss": _known(layer.loss),
                    "heads": [{**asdict(h), "loss": _known(h.loss)} for h in layer.heads],
                }
                for layer in self.layers
            ]
        return record

    def _heads(self) -> Iterator[HeadForecast]:
        return (head for layer in self.layers for head in layer.heads)


def _known(loss: float) -> float | None:
    return None if math.isnan(loss) else loss


def forecast(
    menu: Menu,
    allocation: Allocation,
    share: float,
    rows: int,
    tables: Sequence[int],
    ratios: NDArray[np.float32],
    curves: NDArray[np.float32] | None,
) -> Forecast:
    """The forecast of an allocation; `tables` are the bytes of a head's tables by strategy.

    `curves` [S, L, Hkv, R] are the losses at `ratios`, None where they were not measured. Raises
    UsageError.
    """
    if menu.tokens < 1 or rows < 1:
        raise UsageError(
            f"a plan is for at least one prompt of one token, found {rows} of {menu.tokens}"
        )
    assert allocation.head_loss is not None
    losses = allocation.head_loss if curves is not None else np.full(allocation.ratio.shape, np.nan)
    whole = bool((allocation.ratio >= 1).all())  # then there is no compressed storage
    end, tables = (0, [0] * len(tables)) if whole else (END_BYTES, tables)
    decisions = zip(
        allocation.strategy.tolist(),
        allocation.ratio.tolist(),
        losses.tolist(),
        allocation.limits.tolist(),
        strict=True,
    )
    layers = tuple(
        LayerForecast(
            tuple(
                _head(menu, menu.strategies[choice], ratio, loss, fresh, rows, end, tables[choice])
                for choice, ratio, loss, fresh in zip(*layer, strict=True)
            )
        )
        for layer in decisions
    )
    unit = 2 * menu.head_dim * menu.itemsize
    return Forecast(
        share=share,
        tokens=menu.tokens,
        rows=rows,
        itemsize=menu.itemsize,
        dense_bytes=rows * menu.tokens * unit * allocation.ratio.size,
        layers=layers,
        least_share=float(ratios[0]),
        reference_loss=None if curves is None else poorest_loss(menu.strategies, curves),
    )


def _head(
    menu: Menu,
    strategy: Strategy,
    ratio: float,
    loss: float,
    fresh: int,
    rows: int,
    end: int,
    tables: int,
) -> HeadForecast:
    """One head, as runtime.packing packs it; every segment has `end` bytes beside its tokens."""
    kind, name, host, reads = "static", strategy.name, 0, (0.0, 0)
    unit, sizes = 2 * menu.head_dim * menu.itemsize, (menu.head_dim, menu.itemsize)
    kept = static_layout(strategy, ratio, menu.tokens, menu.keep, *sizes)
    tokens, held = kept.tokens, static_bytes(strategy, kept, *sizes)
    if ratio >= 1:
        kind, name, tokens, loss = WHOLE, WHOLE, menu.tokens, 0.0
        held = tokens * unit
    elif strategy.head_type is HeadType.DYNAMIC:
        slot = SLOT_BYTES + SCORE_BYTES
        layout = dynamic_layout(
            strategy, ratio, menu.tokens, menu.keep, menu.head_dim, menu.itemsize, slot
        )
        if layout is None:
            name = TOO_SHORT
        else:
            kind, tokens = "dynamic", layout.resident_tokens
            held = dynamic_bytes(strategy, layout, *sizes, slot)
            host = layout.items * layout.chunk * unit
            reads = _reads(menu, strategy, layout, fresh)
    return HeadForecast(
        kind=kind,
        strategy=name,
        ratio=ratio,
        resident_tokens=tokens,
        resident_bytes=rows * (held + end),
        host_bytes=rows * host,
        table_bytes=tables,
        loss=loss,
        read_bytes=rows * reads[0],
        most_read_bytes=rows * reads[1],
    )


def _reads(menu: Menu, strategy: Strategy, layout: DynamicLayout, fresh: int) -> tuple[float, int]:
    """Bytes that a dynamic head reads per step: expected, and at most."""
    if layout.hot == layout.items:
        return 0.0, 0
    sizes = (menu.host_bytes, menu.host_bytes)
    rerank, mean = strategy.rerank, min(TURNOVER * layout.hot, fresh)
    expected = read_bytes(rerank, layout, *sizes, mean)
    return expected, int(read_bytes(rerank, layout, *sizes, fresh))
