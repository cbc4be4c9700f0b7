"""A dynamic head's hot buffer holds exactly the chunks that its slot map names."""

from __future__ import annotations

import pytest
import torch

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.policy.costs import dynamic_layout
from hkvprof.runtime.host import DynamicHead, select

SCALING = 0.25


def dynamic_head(
    tokens: int, chunk: int, ratio: float
) -> tuple[DynamicHead, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    key = torch.randn(tokens, 16, generator=generator)
    value = torch.randn(tokens, 16, generator=generator)
    strategy = Strategy(HeadType.DYNAMIC, index="mean", chunk=chunk)
    layout = dynamic_layout(strategy, ratio, tokens, KeepRule(), 16, 4)
    assert layout is not None
    query = torch.randn(2, 16, generator=generator)
    return DynamicHead.build(key, value, query, SCALING, strategy, layout, None), key, value


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("tokens", [97, 200, 331])
def test_hot_buffer_follows_the_selection(tokens: int, chunk: int) -> None:
    head, key, value = dynamic_head(tokens, chunk, 0.75)
    layout = head.layout

    def chunks(of: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        where = layout.sinks + items.long()[:, None] * chunk + torch.arange(chunk)
        return of[where.reshape(-1)]

    hot_key, hot_value = chunks(key, head.slots), chunks(value, head.slots)
    generator = torch.Generator().manual_seed(5)
    for _ in range(12):
        query = torch.randn(2, 16, generator=generator)
        before = set(head.slots.tolist())
        fetched = head.refresh(query, SCALING, hot_key, hot_value)
        wanted = set(select(head.index, query, SCALING, layout.hot).tolist())
        assert set(head.slots.tolist()) == wanted
        assert fetched == len(wanted - before)
        assert torch.equal(hot_key, chunks(key, head.slots))
        assert torch.equal(hot_value, chunks(value, head.slots))
    assert head.refresh(query, SCALING, hot_key, hot_value) == 0


def test_layout_covers_every_token_once() -> None:
    for tokens in (60, 97, 200):
        head, key, _ = dynamic_head(tokens, 16, 0.9)
        layout = head.layout
        assert layout.sinks + layout.items * 16 + layout.recent == tokens
        stored = head.host.data[:, 0].reshape(-1, 16)
        assert torch.equal(stored, key[layout.sinks : layout.sinks + layout.items * 16])


def test_clone_is_independent() -> None:
    head, _, _ = dynamic_head(200, 4, 0.5)
    twin = head.clone()
    hot_key = torch.zeros(head.layout.hot * 4, 16)
    head.refresh(torch.randn(2, 16), SCALING, hot_key, hot_key.clone())
    assert twin.host is head.host
    assert not torch.equal(twin.slots, head.slots)
