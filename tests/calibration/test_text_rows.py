"""What text rows attend to, against the definitions written out in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.calibration.attention import TextStatistics, text_statistics, token_classes
from hkvprof.heads import KeepRule, Modality
from hkvprof.profile.tables import CLASSES
from hkvprof.selection import sparsity as text_rows
from hkvprof.selection.sparsity import largest, sample_text_rows, text_sparsity

KAPPAS = (0.02, 0.05, 0.1, 0.2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(query: Tensor, key: Tensor, head: int, row: int, scaling: float) -> list[float]:
    """The attention weights of one row of one query head, float64."""
    owner = head // (len(query) // len(key))
    logits = scaling * (key[owner, : row + 1].double() @ query[head, row].double())
    return [float(weight) for weight in logits.softmax(dim=0)]


def class_of(token: int, row: int, modality: list[int], keep: KeepRule) -> str:
    if token < keep.sinks:
        return "sinks"
    if token > row - keep.recent:
        return "recent"
    return {Modality.IMAGE: "image", Modality.VIDEO: "video"}.get(Modality(modality[token]), "text")


def brute_force(
    query: Tensor, key: Tensor, rows: list[int], scaling: float, modality: list[int], keep: KeepRule
) -> dict[str, Tensor]:
    """Sparsity [kappas, heads], mass [CLASSES, heads] and entropy [heads] by their definitions."""
    heads = len(query)
    sparsity = torch.zeros(len(KAPPAS), heads, dtype=torch.float64)
    mass = torch.zeros(len(CLASSES), heads, dtype=torch.float64)
    entropy = torch.zeros(heads, dtype=torch.float64)
    for head in range(heads):
        for row in rows:
            weights = dense(query, key, head, row, scaling)
            falling = sorted(weights, reverse=True)
            for number, kappa in enumerate(KAPPAS):
                count = max(1, math.ceil(round(kappa * (row + 1), 9)))
                sparsity[number, head] += sum(falling[:count]) / len(rows)
            for token, weight in enumerate(weights):
                name = class_of(token, row, modality, keep)
                mass[CLASSES.index(name), head] += weight / len(rows)
            spread = -sum(w * math.log(w) for w in weights if w > 0)
            entropy[head] += spread / math.log(max(row + 1, 2)) / len(rows)
    return {"sparsity": sparsity, "mass": mass, "entropy": entropy}


def found(
    query: Tensor, key: Tensor, rows: list[int], scaling: float, modality: list[int], keep: KeepRule
) -> TextStatistics:
    classes = token_classes(torch.tensor(modality), keep)
    return text_statistics(query, key, torch.tensor(rows), scaling, KAPPAS, classes, keep.recent)


def assert_same(result: TextStatistics, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(getattr(result, name).double(), value, rtol=0, atol=2e-5)


# -- rows -----------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(2, 64))
def test_text_rows_follow_the_first_picture_and_are_spread(text: list[bool], limit: int) -> None:
    rows = sample_text_rows(torch.tensor(text), limit).tolist()
    after = text.index(False) if False in text else 0
    eligible = [i for i, is_text in enumerate(text) if is_text and i >= after]
    assert len(rows) == min(limit, len(eligible))
    assert rows == sorted(set(rows))
    assert set(rows) <= set(eligible)
    if rows:
        assert (rows[0], rows[-1]) == (eligible[0], eligible[-1])
        places = [eligible.index(row) for row in rows]
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps, default=1) - min(gaps, default=1) <= 1


# -- the three statistics -------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 90),
    group=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 0.5, 4.0]),
    sinks=st.integers(0, 5),
    recent=st.integers(1, 12),
    block=st.sampled_from([1, 100, 2**20]),
    data=st.data(),
)
def test_statistics_equal_their_definitions(
    seed: int, tokens: int, group: int, sharpness: float, sinks: int, recent: int, block: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    """Any rows, modalities, keep rule and block size, down to rows that see sinks alone."""
    modality = data.draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    rows = sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1, max_size=8)))
    query, key = random(2 * group, tokens, 8, seed=seed), random(2, tokens, 8, seed=seed + 1)
    keep = KeepRule(sinks, recent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "BLOCK", block)
        result = found(query, key, rows, sharpness, modality, keep)
    assert_same(result, brute_force(query, key, rows, sharpness, modality, keep))
    torch.testing.assert_close(result.mass.sum(dim=0), torch.ones(2 * group), rtol=0, atol=1e-6)
    assert float(result.mass.min()) >= 0
    assert 0 <= float(result.entropy.min()) <= float(result.entropy.max()) <= 1


def test_what_a_row_cannot_see_does_not_count() -> None:
    modality, rows, keep = [0] * 4 + [1] * 30 + [0] * 20, [35, 39, 44], KeepRule(2, 3)
    query, key = random(4, 54, 8), random(2, 54, 8, seed=1)
    before = found(query, key, rows, 1.0, modality, keep)
    key[:, 45:] = 1000.0
    modality[45:] = [2] * 9
    after = found(query, key, rows, 1.0, modality, keep)
    for name in ("sparsity", "mass", "entropy"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_attention_on_one_token_and_on_all_alike() -> None:
    """One image token gets everything; a head of zeros spreads evenly."""
    key = torch.zeros(1, 40, 4)
    key[0, 20, 0] = 1000.0
    query = torch.zeros(2, 40, 4)
    query[0, :, 0] = 1.0
    modality = [0] * 10 + [1] * 20 + [0] * 10
    result = found(query, key, [39], 1.0, modality, KeepRule(4, 5))
    assert result.mass[:, 0].tolist() == [0, 0, 1, 0, 0]
    assert result.mass[:, 1].tolist() == pytest.approx([4 / 40, 11 / 40, 20 / 40, 0, 5 / 40])
    assert result.entropy.tolist() == pytest.approx([0, 1])
    assert result.sparsity[:, 0].tolist() == [1, 1, 1, 1]
    assert result.sparsity[:, 1].tolist() == pytest.approx([1 / 40, 2 / 40, 4 / 40, 8 / 40])


def test_sparsity_alone_is_that_of_all_statistics() -> None:
    query, key, rows = random(6, 57, 16), random(2, 57, 16, seed=1), [0, 9, 10, 33, 56]
    alone = text_sparsity(query[:, rows], key, torch.tensor(rows), 0.5, KAPPAS)
    assert torch.equal(alone, found(query, key, rows, 0.5, [0] * 57, KeepRule()).sparsity)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_the_largest_weights_are_those_of_topk(lines: int, seen: int, seed: int) -> None:
    """numpy's sort, on the CPU, against what other devices use."""
    weight = random(lines, seen, seed=seed).exp()
    count = 1 + seed % seen
    expected = weight.topk(count, dim=-1).values
    assert torch.equal(largest(weight.clone(), count), expected)


def test_half_precision_is_computed_in_float32() -> None:
    query, key = random(2, 300, 8).half(), random(1, 300, 8, seed=1).half()
    modality, keep = [1] * 300, KeepRule()
    expected = brute_force(query, key, [299], 1.0, modality, keep)
    assert_same(found(query, key, [299], 1.0, modality, keep), expected)
