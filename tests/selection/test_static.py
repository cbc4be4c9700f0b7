"""Static selection against explicit softmax, loops and the rules of the docstrings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.selection.static import pool, rank_tokens, select_tokens, window_attention

PLAIN = Strategy(HeadType.STATIC)


def with_prior(share: float) -> Strategy:
    return Strategy(HeadType.STATIC, text_prior=share)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_window_row(query: Tensor, key: Tensor, scaling: float, visible: int) -> list[float]:
    """Softmax of one row over its visible tokens, in plain Python."""
    logits = [
        scaling * sum(float(a) * float(b) for a, b in zip(query, key[t], strict=True))
        for t in range(visible)
    ]
    peak = max(logits)
    weights = [math.exp(logit - peak) for logit in logits]
    return [w / sum(weights) for w in weights] + [0.0] * (len(key) - visible)


@pytest.mark.parametrize(
    ("kv_heads", "group", "window", "tokens"), [(2, 3, 4, 9), (1, 1, 6, 6), (3, 2, 1, 5)]
)
def test_window_attention_is_max_over_causal_rows_and_mean_over_the_group(
    kv_heads: int, group: int, window: int, tokens: int
) -> None:
    query, key = random(kv_heads * group, window, 8), random(kv_heads, tokens, 8, seed=1)
    found = window_attention(query, key, scaling=0.7)
    for head in range(kv_heads):
        per_query = []
        for member in range(group):
            rows = [
                one_window_row(
                    query[head * group + member, j], key[head], 0.7, tokens - window + j + 1
                )
                for j in range(window)
            ]
            per_query.append([max(column) for column in zip(*rows, strict=True)])
        expected = [sum(column) / group for column in zip(*per_query, strict=True)]
        assert found[head].tolist() == pytest.approx(expected, abs=1e-6)


def test_window_attention_of_half_precision_inputs_is_computed_in_float32() -> None:
    query, key = random(4, 5, 16).bfloat16(), random(2, 30, 16, seed=1).bfloat16()
    found = window_attention(query, key, 0.25)
    assert found.dtype == torch.float32
    assert torch.equal(found, window_attention(query.float(), key.float(), 0.25))


def test_window_rows_do_not_see_the_future() -> None:
    """A key that only the last row may see gets its score from that row alone."""
    query, key = random(1, 3, 4), random(1, 8, 4, seed=1)
    key[0, -1] = 100 * query[0, 0]  # irresistible for the first row, which must not see it
    alone = window_attention(query[:, -1:], key, 1.0)
    assert window_attention(query, key, 1.0)[0, -1] == alone[0, -1]


def test_nan_in_one_head_leaves_the_others_alone() -> None:
    query, key = random(4, 3, 8), random(2, 40, 8, seed=1)
    clean = window_attention(query, key, 0.3)
    key[1, 7] = torch.nan
    dirty = window_attention(query, key, 0.3)
    assert torch.equal(dirty[0], clean[0])
    keep = KeepRule(sinks=2, recent=3, window=3)
    ranking = rank_tokens(dirty, 5, keep)
    assert torch.equal(ranking[0], rank_tokens(clean, 5, keep)[0])
    assert sorted(ranking[1].tolist()) == list(range(40))
    assert set(ranking[1, :5].tolist()) == {0, 1, 37, 38, 39}


@given(
    scores=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    width=st.sampled_from([1, 3, 5, 7, 31]),
)
def test_pool_averages_the_neighbours_that_exist(scores: list[float], width: int) -> None:
    found = pool(torch.tensor([scores, scores[::-1]]), width)
    half = width // 2
    for row, values in zip(found.tolist(), (scores, scores[::-1]), strict=True):
        for i, value in enumerate(row):
            near = values[max(0, i - half) : i + half + 1]
            assert value == pytest.approx(sum(near) / len(near), abs=1e-6)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Tensor, KeepRule, Tensor]:
    """Attention of one head (with ties and NaN), a keep rule, and text positions."""
    tokens = draw(st.integers(1, 40))
    values = st.sampled_from([0.0, 0.1, 0.1, 0.2, 0.5, 1.0, math.nan]) | st.floats(0, 1, width=32)
    scores = draw(st.lists(values, min_size=tokens, max_size=tokens))
    text = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    keep = KeepRule(sinks=draw(st.integers(0, 5)), recent=draw(st.integers(0, 6)))
    return torch.tensor([scores]), keep, torch.tensor(text)


def always_kept(tokens: int, keep: KeepRule) -> set[int]:
    return {t for t in range(tokens) if t < keep.sinks or t >= tokens - keep.recent}


@given(prompts(), st.sampled_from([1, 3, 7]))
def test_ranking_is_a_permutation_led_by_sinks_and_recent_then_by_score(
    prompt: tuple[Tensor, KeepRule, Tensor], width: int
) -> None:
    attention, keep, _ = prompt
    tokens = attention.shape[1]
    ranking = rank_tokens(attention, width, keep)[0].tolist()
    forced = always_kept(tokens, keep)
    assert sorted(ranking) == list(range(tokens))
    assert set(ranking[: len(forced)]) == forced
    score = pool(attention.nan_to_num(nan=0.0), width)[0].tolist()
    rest = [t for t in range(tokens) if t not in forced]
    assert ranking[len(forced) :] == sorted(rest, key=lambda t: (-score[t], t))


def test_ranking_leaves_its_input_alone() -> None:
    attention = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    before = attention.clone()
    rank_tokens(attention, 1, KeepRule())
    assert torch.equal(attention, before)


@given(prompts(), st.data())
def test_a_head_that_keeps_more_keeps_what_it_kept(
    prompt: tuple[Tensor, KeepRule, Tensor], data: st.DataObject
) -> None:
    attention, keep, text = prompt
    tokens = attention.shape[1]
    ranking = rank_tokens(attention, 3, keep)[0]
    few = data.draw(st.integers(0, tokens))
    many = data.draw(st.integers(few, tokens))
    small = select_tokens(ranking, few, PLAIN, keep, text).tolist()
    large = select_tokens(ranking, many, PLAIN, keep, text).tolist()
    assert len(small) == few
    assert small == sorted(set(small))
    assert set(small) <= set(large)
    if few >= len(always_kept(tokens, keep)):
        assert always_kept(tokens, keep) <= set(small)


def brute_force(
    ranking: list[int], count: int, prior: float, keep: KeepRule, text: list[bool]
) -> list[int]:
    """Sinks and recent, then text up to its share, then whatever ranks next."""
    forced = always_kept(len(ranking), keep)
    chosen = [t for t in ranking if t in forced][:count]
    share = int(prior * count)
    for token in [t for t in ranking if t not in forced and text[t]][:share]:
        if len(chosen) < count:
            chosen.append(token)
    for token in ranking:
        if len(chosen) < count and token not in chosen:
            chosen.append(token)
    return sorted(chosen)


@settings(max_examples=300)
@given(prompts(), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), st.data())
def test_the_text_prior_claims_at_most_its_share(
    prompt: tuple[Tensor, KeepRule, Tensor], prior: float, data: st.DataObject
) -> None:
    attention, keep, text = prompt
    tokens = attention.shape[1]
    ranking = rank_tokens(attention, 1, keep)[0]
    count = data.draw(st.integers(1, tokens))
    kept = select_tokens(ranking, count, with_prior(prior), keep, text).tolist()
    assert kept == brute_force(ranking.tolist(), count, prior, keep, text.tolist())
    plain = set(select_tokens(ranking, count, PLAIN, keep, text).tolist())
    gained = set(kept) - plain
    assert all(bool(text[t]) for t in gained)
    assert len(gained) <= int(prior * count)
    forced = always_kept(tokens, keep)
    if count >= len(forced):
        assert forced <= set(kept)


def test_a_text_prior_without_known_text_positions_changes_nothing() -> None:
    keep = KeepRule(sinks=1, recent=1)
    ranking = rank_tokens(random(1, 20).abs(), 1, keep)[0]
    assert torch.equal(
        select_tokens(ranking, 8, with_prior(0.5), keep, None),
        select_tokens(ranking, 8, PLAIN, keep, None),
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 5), st.floats(0, 0.9))
def test_hidden_tokens_get_and_give_no_attention(seed: int, window: int, share: float) -> None:
    """As if they were not there; hidden rows of the window have no vote."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(4, window, 8, generator=generator)
    key = torch.randn(2, 20, 8, generator=generator)
    visible = torch.rand(20, generator=generator) >= share
    visible[-1] = True
    found = window_attention(query, key, 0.5, visible)
    rows = visible[-window:]
    expected = window_attention(query[:, rows], key[:, visible], 0.5)
    assert not found[:, ~visible].any()
    torch.testing.assert_close(found[:, visible], expected)
    torch.testing.assert_close(
        window_attention(query, key, 0.5, torch.ones_like(visible)),
        window_attention(query, key, 0.5),
    )
