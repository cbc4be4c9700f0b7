"""Methods that look at one prompt's queries, keys and values: cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hkvprof.errors import ModelError
from hkvprof.evaluate.baselines import PromptView, find
from hkvprof.evaluate.baselines import adakv as adakv_file
from hkvprof.evaluate.baselines import chunkkv as chunkkv_file
from hkvprof.evaluate.baselines import expected_attention as expected_file
from hkvprof.evaluate.baselines import hybridkv as hybridkv_file
from hkvprof.evaluate.baselines import look_m as look_m_file
from hkvprof.evaluate.baselines import madakv as madakv_file
from hkvprof.evaluate.baselines import triattention as triattention_file
from hkvprof.evaluate.baselines.base import Kept
from hkvprof.evaluate.baselines.scores import with_recent
from hkvprof.heads import HeadType
from hkvprof.models.decoder_input import DecoderInput, Rotation
from hkvprof.runtime.plan import HeadPlan
from hkvprof.selection.static import window_attention
from tests.evaluate.baselines.synthetic import (
    counts,
    kept,
    prompt_of,
    random_prompt,
    still,
    with_values_as_numbers,
)

torch.set_num_threads(1)


def attending(wanted: list[list[list[float]]], share: float) -> PromptView:
    """A prompt whose every row attends, in `wanted[layer][head]`, in proportion to the weights.

    One query head per KV head, all queries alike; no row but the last sees all tokens.
    """
    weights = torch.tensor(wanted)
    key = torch.zeros(*weights.shape, 2)
    key[..., 0] = weights.clamp(min=1e-9).log()
    query = torch.zeros_like(key)
    query[..., 0] = 1
    return with_values_as_numbers(prompt_of(query, key, key.clone(), share))


def select(name: str, prompt: PromptView) -> list[list[list[int]]]:
    """Kept token numbers per layer and head."""
    return kept(prompt, find(name).select(prompt))


def test_pyramid_falls_linearly_and_keeps_the_total() -> None:
    prompt = random_prompt(0, tokens=100, share=0.2, layers=4)
    # Room 20, window 10; the last layer has 10 + 10/20, the first 10 + 20 - 10/20.
    exact = [29.5, 29.5 - 19 / 3, 29.5 - 38 / 3, 10.5]
    numbers = [layer[0] for layer in counts(find("pyramidkv").select(prompt))]
    assert sum(numbers) == 80
    assert all(abs(a - b) < 1 for a, b in zip(numbers, exact, strict=True))


def test_pyramid_ends_at_the_prompt_when_the_room_is_large() -> None:
    prompt = random_prompt(0, tokens=40, share=0.75, layers=3)
    # Room 30, window 15: the first layer would want 44.25 of 40; it has all, the last 20.
    numbers = [layer[0] for layer in counts(find("pyramidkv").select(prompt))]
    assert numbers == [40, 30, 20]


def test_adakv_moves_room_to_the_head_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        adakv_file, "snapkv_of", lambda prompt: [torch.tensor([[9.0, 8, 7, 6, 5], [4, 1, 2, 3, 0]])]
    )
    prompt = attending([[[1.0] * 5] * 2], share=0.4)
    # Room 2: one window token (room // 2) and int(.2 * 1) = 0 more are safe for each head.
    assert select("adakv", prompt) == [[[0, 1, 2], [0]]]


def test_snapkv_max_takes_the_largest_of_the_window() -> None:
    prompt = with_values_as_numbers(random_prompt(3, 60, 0.3, layers=1))
    layer = prompt.layers[0]
    score = window_attention(layer.query[:, -16:], layer.key, layer.scaling)
    for head, row in enumerate(select("snapkv_max", prompt)[0]):
        free = score.shape[-1] - 9  # room 18, half of it recent
        pooled = torch.stack([score[head, max(0, i - 15) : i + 16].mean() for i in range(60)])
        best = pooled[:free].topk(9).indices.sort().values.tolist()
        assert row == [*best, *range(free, 60)]


def test_chunks_score_the_mean_of_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunkkv_file, "CHUNK", 2)
    score = torch.tensor([[1.0, 3, 9, 0, 5]])
    assert chunkkv_file.by_chunk(score).tolist() == [[2.0, 2, 4.5, 4.5, 5]]


def test_the_last_chunk_is_kept_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunkkv_file, "CHUNK", 4)
    weights = [0.01] * 4 + [0.5, 0.01, 0.01, 0.01] + [0.2] * 4 + [0.01] * 4
    prompt = with_values_as_numbers(random_prompt(0, 16, 0.5, layers=1, kv_heads=1))
    monkeypatch.setattr(chunkkv_file, "snapkv_scores", lambda layer, width: torch.tensor([weights]))
    monkeypatch.setattr(
        chunkkv_file, "with_recent", lambda prompt, score: with_recent(prompt, score, 2)
    )
    # Room 8: tokens 14 and 15 stay, then the chunk from 8 (mean .2), then half of that from 4.
    assert select("chunkkv", prompt) == [[[4, 5, 8, 9, 10, 11, 14, 15]]]


def test_keydiff_keeps_keys_unlike_the_others() -> None:
    key = torch.zeros(1, 1, 8, 2)
    key[..., 0] = 3.0
    key[0, 0, 5] = torch.tensor([0.0, 7.0])
    key[0, 0, 2] = torch.tensor([1.0, 1.0])
    key[0, 0, 3] = torch.tensor([9.0, 1.0])
    prompt = with_values_as_numbers(prompt_of(key, key, key.clone(), share=0.5))
    assert select("keydiff", prompt) == [[[2, 5, 6, 7]]]  # half of the room is recent


def test_expected_attention_by_brute_force() -> None:
    torch.manual_seed(0)
    tokens, dim = 40, 4
    query = torch.randn(1, 2, tokens, dim) + torch.tensor([1.0, 0, -1, 0])
    key, value = torch.randn(1, 1, tokens, dim), torch.randn(1, 1, tokens, dim)
    prompt = prompt_of(query, key, value, 0.3, scaling=0.5)
    expected = torch.zeros(tokens)
    for head in range(2):
        past = query[0, head, 4:].double()
        mean = past.mean(0)
        sigma = torch.zeros(dim, dim, dtype=torch.double)
        for row in past:
            sigma += torch.outer(row - mean, row - mean) / len(past)
        logit = [float(mean @ k * 0.5 + k @ sigma @ k * 0.125) for k in key[0, 0, 4:].double()]
        total = sum(math.exp(x) for x in logit)
        expected[4:] += torch.tensor([math.exp(x) / total / 2 for x in logit])
    expected = (expected + expected_file.EPSILON) * value[0, 0].norm(dim=-1)
    found = expected_file.expected(prompt.layers[0], still(tokens, dim))[0]
    assert torch.allclose(found[4:], expected[4:], rtol=1e-4)
    named = with_values_as_numbers(prompt)  # scores are taken anew: sinks whatever they score
    for row in select("expected_attention", named)[0]:  # room 12: half of it is recent
        assert row[:4] == [0, 1, 2, 3]
        assert row[-6:] == [*range(34, 40)]


def test_expected_attention_turns_the_statistics() -> None:
    """Queries of one kind before rotation: the score is that of the mean rotation ahead."""
    torch.manual_seed(1)
    tokens, dim = 30, 4
    angle = torch.arange(tokens)[:, None] * torch.tensor([0.3, 0.01]).repeat(2)
    rotation = Rotation(angle.cos(), angle.sin())
    plain = torch.randn(dim).expand(1, tokens, dim)
    key, value = torch.randn(1, 1, tokens, dim), torch.ones(1, 1, tokens, dim)
    layer = prompt_of(turned(plain, rotation)[None], key, value, 0.5).layers[0]
    ahead = torch.zeros(dim)
    for step in range(1, expected_file.AHEAD + 1):
        position = angle[-1] + (angle[1] - angle[0]) * step
        one = Rotation(position.cos()[None], position.sin()[None])
        ahead += turned(plain[:, :1], one)[0, 0] / expected_file.AHEAD
    weight = (layer.key[0, 4:] @ ahead).softmax(-1)
    found = expected_file.expected(layer, rotation)[0, 4:]
    assert torch.allclose(found, (weight + expected_file.EPSILON) * 2, rtol=1e-3, atol=1e-5)


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding, halves against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin


def test_expected_attention_needs_rotary_embeddings() -> None:
    prompt = random_prompt(0, 20, 0.5)
    prompt.prefill.decoder_input.rotation = None
    assert isinstance(prompt.prefill.decoder_input, DecoderInput)
    with pytest.raises(ModelError, match="expected_attention needs rotary"):
        find("expected_attention").select(prompt)


def test_look_m_merges_evicted_vision_into_the_nearest_key() -> None:
    key = torch.tensor([[1.0, 0], [0, 1], [2, 0], [4, 0], [0, 6], [0, 3]])
    value = torch.tensor([[1.0, 1], [2, 2], [3, 3], [5, 5], [8, 8], [7, 7]])
    text = torch.tensor([True, True, False, False, False, True])
    prompt = prompt_of(key[None, None], key[None, None], value[None, None], 0.34, text)
    assert prompt.room == 2
    score = torch.tensor([9.0, 8, 1, 2, 3, 4])
    result = look_m_file.merged(prompt, prompt.layers[0], 0, score)
    # Tokens 2 and 3 look like 0: mean of 1, (2 + 1) / 2 and (4 + 1) / 2; token 4 like 1. 5 is text.
    assert torch.allclose(result.key, torch.tensor([[5 / 3, 0], [0, (1 + 3.5) / 2]]))
    assert torch.allclose(result.value[:, 0], torch.tensor([(1 + 2 + 3) / 3, (2 + 5) / 2]))


@pytest.mark.parametrize(("share", "prior"), [(0.6, True), (0.4, False)])
def test_look_m_keeps_text_first_if_all_of_it_fits(
    monkeypatch: pytest.MonkeyPatch, share: float, prior: bool
) -> None:
    monkeypatch.setattr(look_m_file, "_pivotal", lambda kept, gone, target: kept)
    weights = [0.3, 0.01, 0.3, 0.02, 0.3, 0.01, 0.03, 0.01, 0.01, 0.01]
    prompt = attending([[weights]], share)
    object.__setattr__(prompt.prefill, "text", torch.tensor([False, True] * 5))
    # Rooms 6 and 4, of which half is recent; the text is 1, 3, 5, 7 and 9.
    want = [[[1, 3, 5, 7, 8, 9]]] if prior else select("snapkv", attending([[weights]], share))
    assert select("look_m", prompt) == want


def test_madakv_counts_the_tokens_that_hold_most_of_the_attention() -> None:
    assert madakv_file._needed(torch.tensor([0.1, 0.6, 0.25, 0.05])) == 3
    assert madakv_file._needed(torch.tensor([0.95, 0.05])) == 1
    assert madakv_file._needed(torch.tensor([])) == 0


def test_madakv_divides_a_head_by_its_preference() -> None:
    text = torch.tensor([True] * 4 + [False] * 6)
    attention = torch.tensor([0.1] * 4 + [0.1] * 6)  # .4 on text, .6 on vision
    score = torch.tensor([4.0, 3, 2, 1, 6, 5, 4, 3, 2, torch.inf])
    chosen = madakv_file._divided(score, attention, text, 6)
    assert sorted(chosen.tolist()) == [0, 1, 4, 5, 6, 9]
    every = madakv_file._divided(score, attention, text, 9)  # there are but 4 text tokens
    assert len(every) == 9


def test_madakv_gives_more_to_layers_that_need_more() -> None:
    flat, sharp = [0.05] * 20, [0.9, *[0.1 / 19] * 19]
    text = torch.tensor([True] * 10 + [False] * 10)
    prompt = attending([[flat, flat], [sharp, sharp]], share=0.5)
    object.__setattr__(prompt.prefill, "text", text)
    first, second = counts(find("madakv").select(prompt))
    # Flat weights need all tokens, sharp ones few: 8 each, and the other 4 in that proportion.
    assert first == [11, 11]
    assert second == [9, 9]


@pytest.mark.parametrize(("theta", "static"), [(0.0, True), (1.1, False)])
def test_hybridkv_classifies_by_threshold(
    monkeypatch: pytest.MonkeyPatch, theta: float, static: bool
) -> None:
    monkeypatch.setattr(hybridkv_file, "THETA", theta)
    prompt = random_prompt(0, tokens=200, share=0.3)
    choices = [c for layer in find("hybridkv").select(prompt) for c in layer]
    assert all(isinstance(choice, Kept) == static for choice in choices)
    if static:
        total = sum(len(c.key) for c in choices if isinstance(c, Kept))
        assert total <= 0.3 * 200 * len(choices)
    else:
        plans = [c for c in choices if isinstance(c, HeadPlan)]
        assert {p.strategy.head_type for p in plans} == {HeadType.DYNAMIC}
        assert {p.strategy.chunk for p in plans} == {16}


def test_hybridkv_group_is_static_only_if_all_of_it_is() -> None:
    tokens = 100
    key = torch.zeros(1, 1, tokens, 2)
    key[0, 0, 3, 0] = 30.0
    query = torch.zeros(1, 2, tokens, 2)
    query[0, 0, :, 0] = 1.0  # this one sees token 3 alone, the other one all alike
    prompt = prompt_of(query, key, key.clone(), 0.5)
    assert isinstance(find("hybridkv").select(prompt)[0][0], HeadPlan)
    query[0, 1] = query[0, 0]
    prompt = prompt_of(query, key, key.clone(), 0.5)
    assert isinstance(find("hybridkv").select(prompt)[0][0], Kept)


def test_hybridkv_where_no_text_follows_the_context() -> None:
    prompt = random_prompt(0, tokens=120, share=0.3)
    prompt.text[:] = False
    prompt.text[:5] = True
    assert len(find("hybridkv").select(prompt)) == 2


def test_triattention_is_its_published_series() -> None:
    """Sum over bands of |mean q| |k| cos(distance * frequency + phase), mean over distances, plus
    (mean |q| - |mean q|) |k|, with keys and queries before their rotation."""
    generator = torch.Generator().manual_seed(5)
    tokens, bands = 9, 3
    frequency = torch.tensor([1.0, 0.1, 0.01])
    angle = torch.arange(tokens)[:, None] * frequency
    rotation = Rotation(angle.cos().repeat(1, 2), angle.sin().repeat(1, 2))
    raw_query, raw_key = torch.randn(2, 1, tokens, 2 * bands, generator=generator)
    raw_query += 2

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * rotation.cos + torch.cat([-second, first], dim=-1) * rotation.sin

    query = torch.complex(*raw_query[0].chunk(2, dim=-1))
    key = torch.complex(*raw_key[0].chunk(2, dim=-1))
    mean = query.mean(dim=0)
    wanted = []
    for position in range(tokens):
        total = 0.0
        for doubling in range(17):
            distance = tokens - 1 - position + 2.0**doubling
            phase = distance * frequency + (mean * key[position].conj()).angle()
            total += float((mean.abs() * key[position].abs() * phase.cos()).sum()) / 17
        extra = (query.abs().mean(dim=0) - mean.abs()) * key[position].abs()
        wanted.append(total + float(extra.sum()))
    undone = rotation.undo(turned(raw_query))
    found = triattention_file.head_scores(undone, turned(raw_key), rotation)[0]
    # Angles of 65,536 radians and more in float32: a hundredth of a turn.
    assert found.tolist() == pytest.approx(wanted, abs=0.05)


def test_triattention_refuses_models_without_rotation() -> None:
    prompt = random_prompt(0, 20, 0.5)
    prompt.prefill.decoder_input.rotation = None
    with pytest.raises(ModelError, match="triattention needs rotary position embeddings"):
        find("triattention").select(prompt)
