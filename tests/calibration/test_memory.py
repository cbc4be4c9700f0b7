"""Calibration's memory per layer: 64 MiB at 16k tokens, however many heads there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hkvprof.calibration.attention import Phase, layer_drift, text_statistics, token_classes
from hkvprof.calibration.losses import DecodeRows, layer_losses
from hkvprof.heads import HeadType, KeepRule, Strategy
from tests.calibration.live_bytes import LiveBytes
from tests.tables import fit_tables

TOKENS, MIB = 16384, 2**20
LIMIT = 64 * MIB
KEEP = KeepRule()
SHAPES = [(1, 1), (1, 32), (16, 1), (4, 7)]
"""KV heads, query heads of each."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_tracker_sees_what_is_alive_at_once() -> None:
    given = torch.zeros(MIB)
    with LiveBytes(given) as seen:
        view = given[: MIB // 2].mul_(2)  # neither a view nor a change in place is new
        assert seen.peak == 0
        one = given + 1
        two = one[None] * view[:1]
        del one, two
        three = given.double()
        del three
    assert seen.peak == 2 * 4 * MIB


@pytest.mark.parametrize(("kv_heads", "group"), SHAPES)
def test_text_rows_of_bfloat16_keys_of_width_128(kv_heads: int, group: int) -> None:
    """64 rows at the end, the most that are looked at."""
    query = random(kv_heads * group, TOKENS, 1).to(torch.bfloat16).expand(-1, -1, 128)
    key = random(kv_heads, TOKENS, 1, seed=1).to(torch.bfloat16).expand(-1, -1, 128)
    rows = torch.arange(TOKENS - 64, TOKENS)
    classes = token_classes(torch.ones(TOKENS, dtype=torch.long), KEEP)
    with LiveBytes(query, key, rows, classes) as seen:
        text_statistics(query, key, rows, 0.1, (0.02, 0.05, 0.1, 0.2), classes, KEEP.recent)
    assert MIB < seen.peak <= LIMIT / 2


@pytest.mark.parametrize(("kv_heads", "group"), SHAPES)
def test_drift(kv_heads: int, group: int) -> None:
    heads, new = kv_heads * group, 96
    key = random(kv_heads, TOKENS + new, 8)
    phases = [
        Phase(random(heads, count, 8), torch.arange(end - count, end))
        for count, end in ((16, TOKENS), (48, TOKENS + 48), (32, TOKENS + new))
    ]
    with LiveBytes(key, [(phase.query, phase.rows) for phase in phases]) as seen:
        layer_drift(phases, key, TOKENS, 0.3, KEEP)
    assert MIB < seen.peak <= LIMIT / 2


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 14), (4, 2)])
def test_loss_curves(kv_heads: int, group: int) -> None:
    """Both types, index and reranking included, over 64 decoding rows."""
    heads, count, dim = kv_heads * group, 64, 16
    key = random(kv_heads, TOKENS, dim)
    tables = {
        (h, 32): fit_tables(random(64, dim), key[h, :512], (32,))[32] for h in range(kv_heads)
    }
    rows = DecodeRows(
        query=random(heads, count, dim),
        key=key,
        value=random(kv_heads, TOKENS, dim),
        new_key=random(kv_heads, count, dim),
        new_value=random(kv_heads, count, dim),
        positions=torch.arange(count),
        gradient=random(count, heads, dim),
        projection=random(32, heads * dim),
        output_norm=torch.ones(count),
        exact=torch.zeros(count, dtype=torch.bool),
        scaling=0.3,
    )
    window, text = random(heads, KEEP.window, dim), torch.zeros(TOKENS, dtype=torch.bool)
    menu = (
        Strategy(HeadType.STATIC, pool=31),
        Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=64),
    )
    given = [vars(rows), window, text, [table.tensors() for table in tables.values()]]
    kept = [value for value in torch.utils._pytree.tree_leaves(given) if isinstance(value, Tensor)]
    with LiveBytes(*kept) as seen:
        layer_losses(rows, window, menu, (0.05, 0.2), KEEP, tables, text, itemsize=4)
    assert MIB < seen.peak <= LIMIT
