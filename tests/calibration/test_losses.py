"""Loss curves of one layer against brute force from the definitions, and against the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration import losses as statistics
from hkvprof.calibration.continuation import Continuation, build_continuation
from hkvprof.calibration.losses import DecodeRows, LayerLosses, layer_losses
from hkvprof.calibration.observe import ObservedCache, Observer
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.heads import HeadType, KeepRule, Modality, Strategy
from hkvprof.models.adapter import view_model
from hkvprof.models.attention import hooked_attention
from hkvprof.models.calls import cache_of, with_cache
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.costs import dynamic_layout, static_layout
from hkvprof.selection.index import HeadTables, build_index
from hkvprof.selection.residents import quantised
from hkvprof.selection.static import rank_tokens, select_tokens, window_attention
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply
from tests.tables import fit_tables


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- losses by brute force ------------------------------------------------------------------------

KEEP = KeepRule(sinks=2, recent=4, window=5)
RATIOS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.0)
MENU = (
    Strategy(HeadType.STATIC, pool=1),
    Strategy(HeadType.STATIC, pool=5),
    Strategy(HeadType.STATIC, pool=1, text_prior=0.5),
    Strategy(HeadType.DYNAMIC, index="mean", chunk=8),
    Strategy(HeadType.DYNAMIC, index="minmax", chunk=4),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=7),
    Strategy(HeadType.STATIC, pool=5, resident_bits=4),
    Strategy(HeadType.STATIC, pool=1, resident_bits=8),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=7, resident_bits=8),
)
KV_HEADS, GROUP, DIM, TOKENS, NEW = 2, 2, 16, 96, 9


@dataclass(frozen=True)
class Layer:
    """A fabricated layer: decoding rows, window queries, index tables and text positions."""

    rows: DecodeRows
    window: Tensor
    tables: dict[tuple[int, int], HeadTables]
    text: Tensor

    def losses(self, menu: tuple[Strategy, ...], ratios: tuple[float, ...]) -> LayerLosses:
        return layer_losses(
            self.rows, self.window, menu, ratios, KEEP, self.tables, self.text, itemsize=4
        )


def make_layer(scale: float = 1.5, seed: int = 0) -> Layer:
    heads = KV_HEADS * GROUP
    positions = torch.tensor([0, 2, 3, 5, 6, 8])
    key = random(KV_HEADS, TOKENS, DIM, seed=seed + 1)
    tables = {}
    for head in range(KV_HEADS):
        tables[head, 32] = fit_tables(random(64, DIM, seed=seed + 10), key[head], (32,))[32]
    rows = DecodeRows(
        query=scale * random(heads, len(positions), DIM, seed=seed),
        key=key,
        value=random(KV_HEADS, TOKENS, DIM, seed=seed + 2),
        new_key=random(KV_HEADS, NEW, DIM, seed=seed + 3),
        new_value=random(KV_HEADS, NEW, DIM, seed=seed + 4),
        positions=positions,
        gradient=random(len(positions), heads, DIM, seed=seed + 5),
        projection=random(24, heads * DIM, seed=seed + 6),
        output_norm=random(len(positions), seed=seed + 7).abs() + 0.5,
        exact=torch.tensor([False, False, False, True, False, False]),
        scaling=0.5,
    )
    window = 2 * random(heads, KEEP.window, DIM, seed=seed + 8)
    return Layer(rows, window, tables, random(TOKENS, seed=seed + 9) > 0.5)


def kept_tokens(
    layer: Layer, head: int, strategy: Strategy, ratio: float, row: int
) -> list[int] | None:
    """Prompt tokens that the row may attend to; None when the strategy does not fit."""
    rows = layer.rows
    tokens = rows.key.shape[1]
    if ratio >= 1:
        return list(range(tokens))
    if strategy.head_type is HeadType.STATIC:
        attention = window_attention(layer.window, rows.key, rows.scaling)
        ranking = rank_tokens(attention, strategy.pool, KEEP)[head]
        count = static_layout(strategy, ratio, tokens, KEEP, rows.key.shape[2], 4).tokens
        return select_tokens(ranking, count, strategy, KEEP, layer.text).tolist()
    layout = dynamic_layout(strategy, ratio, tokens, KEEP, rows.key.shape[2], itemsize=4)
    if layout is None:
        return None
    if rows.exact[row]:
        return list(range(tokens))
    end = layout.sinks + layout.items * layout.chunk
    chunks = rows.key[head, layout.sinks : end].view(layout.items, layout.chunk, -1)
    stored = as_stored(layer, strategy).rows.key[head, layout.sinks : end]
    index = build_index(strategy, chunks, layer.tables.get((head, strategy.bits)))
    group = rows.query.shape[0] // rows.key.shape[0]
    query = rows.query[head * group : (head + 1) * group, row]
    score = index.score(query, rows.scaling)
    if strategy.rerank:
        named = score.topk(min(layout.items, layout.hot + strategy.rerank)).indices
        exact = (query @ stored[named].T * rows.scaling).softmax(dim=-1).mean(dim=0)
        score = torch.full_like(score, -1.0).index_copy_(0, named, exact)
    kept = [*range(layout.sinks), *range(tokens - layout.recent, tokens)]
    for item in score.topk(layout.hot).indices.tolist():
        start = layout.sinks + item * layout.chunk
        kept += range(start, start + layout.chunk)
    return sorted(kept)


def as_stored(layer: Layer, strategy: Strategy) -> Layer:
    """The layer with keys and values as the strategy keeps them."""
    rows = layer.rows
    if strategy.resident_bits == 16:
        return layer
    kept = [
        quantised(*pair, strategy.resident_bits, KEEP.sinks, TOKENS - KEEP.recent)
        for pair in zip(rows.key, rows.value, strict=True)
    ]
    key, value = (torch.stack(part) for part in zip(*kept, strict=True))
    return replace(layer, rows=replace(rows, key=key, value=value))


def attend(layer: Layer, query_head: int, row: int, kept: list[int]) -> Tensor:
    """Softmax over the kept prompt tokens and the new tokens in sight, in float64."""
    rows = layer.rows
    head = query_head // (rows.query.shape[0] // rows.key.shape[0])
    seen = int(rows.positions[row]) + 1
    keys = torch.cat([rows.key[head, kept], rows.new_key[head, :seen]]).double()
    values = torch.cat([rows.value[head, kept], rows.new_value[head, :seen]]).double()
    return (rows.scaling * (keys @ rows.query[query_head, row].double())).softmax(dim=0) @ values


def brute_force(layer: Layer, head: int, strategy: Strategy, ratio: float) -> list[float]:
    """The three loss terms of one head, strategy and ratio, row by row."""
    rows = layer.rows
    group, dim = rows.query.shape[0] // rows.key.shape[0], rows.query.shape[2]
    whole = list(range(rows.key.shape[1]))
    errors, margins = [], []
    for row in range(rows.query.shape[1]):
        kept = kept_tokens(layer, head, strategy, ratio, row)
        if kept is None:
            return [float(INFEASIBLE)] * 3
        lost = torch.zeros(rows.projection.shape[0], dtype=torch.float64)
        margin = 0.0
        for member in range(head * group, (head + 1) * group):
            held = layer if ratio >= 1 else as_stored(layer, strategy)
            change = attend(layer, member, row, whole) - attend(held, member, row, kept)
            columns = rows.projection[:, member * dim : (member + 1) * dim].double()
            lost += columns @ change
            margin += float(rows.gradient[row, member].double() @ change)
        errors.append(float(lost.norm()) / float(rows.output_norm[row]))
        margins.append(margin**2)
    count = len(errors)
    return [sum(errors) / count, sum(e * e for e in errors) / count, sum(margins) / count]


def assert_matches(layer: Layer, menu: tuple[Strategy, ...], ratios: tuple[float, ...]) -> None:
    found = layer.losses(menu, ratios)
    for s, strategy in enumerate(menu):
        for head in range(KV_HEADS):
            for r, ratio in enumerate(ratios):
                expected = brute_force(layer, head, strategy, ratio)
                terms = [float(t[s, head, r]) for t in (found.output, found.square, found.reply)]
                assert terms == pytest.approx(expected, rel=2e-3, abs=1e-6), (strategy, head, ratio)


@pytest.mark.parametrize("strategy", MENU, ids=lambda strategy: strategy.name)
def test_losses_equal_brute_force(strategy: Strategy) -> None:
    assert_matches(make_layer(), (strategy,), RATIOS)


@pytest.mark.parametrize("block", [1, 400])
def test_blocks_of_rows_make_the_same_losses(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row and two rows at a time; infeasible points stay so to the bit."""
    layer = make_layer()
    whole = layer.losses(MENU, RATIOS)
    monkeypatch.setattr(statistics, "BLOCK", block)
    parts = layer.losses(MENU, RATIOS)
    for name in ("output", "square", "reply"):
        expected, found = getattr(whole, name), getattr(parts, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        same = expected >= float(INFEASIBLE)
        assert torch.equal(found[same], expected[same])
        assert same.any()


def test_losses_stand_in_the_order_of_menu_heads_and_ratios() -> None:
    layer = make_layer()
    whole = layer.losses(MENU, RATIOS)
    assert whole.output.shape == whole.square.shape == whole.reply.shape == (len(MENU), KV_HEADS, 6)
    for s, strategy in enumerate(MENU):
        alone = layer.losses((strategy,), RATIOS)
        assert torch.equal(whole.output[s], alone.output[0])
        assert torch.equal(whole.reply[s], alone.reply[0])


def test_the_whole_prompt_costs_nothing_and_too_little_is_infeasible() -> None:
    losses = make_layer().losses(MENU, RATIOS)
    for term in (losses.output, losses.square, losses.reply):
        assert bool((term[..., -1] == 0).all())
        assert bool((term[:3] < 1e3).all())  # static heads always have their sinks and recent
        assert bool((term[3:7, :, 0] == float(INFEASIBLE)).all())
        assert bool((term[3:7, :, 3] < 1e3).all())


def test_a_prompt_too_short_for_a_chunk_is_infeasible_below_one() -> None:
    layer = make_layer()
    rows = replace(layer.rows, key=layer.rows.key[:, :10], value=layer.rows.value[:, :10])
    short = replace(layer, rows=rows, text=layer.text[:10])
    losses = short.losses((MENU[3],), RATIOS)
    assert losses.output[0, 0].tolist() == [float(INFEASIBLE)] * 5 + [0.0]


def test_exact_rows_lose_nothing_on_dynamic_heads_but_do_on_static_ones() -> None:
    layer = make_layer()
    all_exact = replace(layer, rows=replace(layer.rows, exact=torch.ones(6, dtype=torch.bool)))
    losses = all_exact.losses(MENU, (0.5,))
    assert losses.output[3:7].abs().max() < 1e-5
    assert torch.equal(losses.output[:3], layer.losses(MENU, (0.5,)).output[:3])
    assert losses.output[:3].min() > 1e-3


def test_rows_see_no_later_new_tokens() -> None:
    layer = make_layer()
    rows = replace(layer.rows, positions=layer.rows.positions.clamp(max=6))
    before = replace(layer, rows=rows).losses(MENU, (0.3,))
    new_key, new_value = rows.new_key.clone(), rows.new_value.clone()
    new_key[:, 7:] = 50.0
    new_value[:, 7:] = -1000.0
    after = replace(layer, rows=replace(rows, new_key=new_key, new_value=new_value))
    assert torch.allclose(after.losses(MENU, (0.3,)).output, before.output, rtol=1e-5, atol=1e-7)


def test_a_head_may_keep_nothing_but_the_new_tokens() -> None:
    layer = make_layer()
    losses = layer_losses(
        layer.rows, layer.window, MENU[:1], (0.001,), KeepRule(sinks=0, recent=0), {}, layer.text, 4
    )
    rows = layer.rows
    for head in range(KV_HEADS):
        errors = []
        for row in range(6):
            lost = torch.zeros(24, dtype=torch.float64)
            for member in range(head * GROUP, (head + 1) * GROUP):
                change = attend(layer, member, row, list(range(TOKENS))) - attend(
                    layer, member, row, []
                )
                lost += rows.projection[:, member * DIM : (member + 1) * DIM].double() @ change
            errors.append(float(lost.norm() / rows.output_norm[row]))
        assert float(losses.output[0, head, 0]) == pytest.approx(sum(errors) / 6, rel=1e-3)


@pytest.mark.parametrize("strategy", [MENU[0], MENU[3]], ids=["static", "dynamic"])
def test_losses_hold_when_all_that_matters_is_pruned(strategy: Strategy) -> None:
    """One token that no selection keeps lies 150 above all other logits."""
    layer = make_layer(scale=0.0)
    rows = layer.rows
    key = 0.1 * rows.key
    key[:, 50] = 0.0
    key[:, 50, 0] = 300.0
    new_key = rows.new_key.clone()
    new_key[..., 0] = 0.0
    query = random(4, 6, DIM, seed=77)
    query[..., 0] = 1.0
    window = random(4, KEEP.window, DIM, seed=78)
    window[..., 0] = -1.0
    # The mean digest sees the outlier; a negative neighbour in its chunk hides it.
    key[:, 51] = 0.0
    key[:, 51, 0] = -310.0
    hard = replace(layer, rows=replace(rows, query=query, key=key, new_key=new_key), window=window)
    assert 50 not in (kept_tokens(hard, 0, strategy, 0.3, 0) or [50])
    assert_matches(hard, (strategy,), (0.3,))


# -- agreement with the runtime -------------------------------------------------------------------


@dataclass(frozen=True)
class Traced:
    """A sample on tinyvl as calibration sees it, all layers."""

    continuation: Continuation
    tokens: int
    text: Tensor
    rows: list[DecodeRows]
    window: dict[int, Tensor]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sample() -> Any:
    return make_sample("list", 3, images=4, rows=6, cols=6, followups=2)


@pytest.fixture(scope="module")
def traced(tiny: tuple[Any, Any], sample: Any) -> Traced:
    model, processor = tiny
    view = view_model(model)
    encoded = processor.encode([sample.messages])
    continuation = build_continuation(processor, sample, sample.reply, 192)
    observer = Observer(KeepRule().window)
    cache = ObservedCache(view, observer)
    with torch.no_grad(), hooked_attention(model):
        with observer.phase("prefill"):
            model(**encoded.to(model.device, model.dtype), **with_cache(model, cache))
        with observer.phase("trace"):
            model(input_ids=continuation.ids[None], **with_cache(model, cache))
    picked, prompt = continuation.rows, encoded.tokens
    rows = []
    for layer in range(view.grid.layers):
        trace, stored = observer.traces[layer], cache.covered[layer]
        projection = view.output_projection(layer).detach()
        output = trace.output[0][picked].flatten(1) @ projection.T
        rows.append(
            DecodeRows(
                query=trace.query[:, picked],
                key=stored.keys[0, :, :prompt],
                value=stored.values[0, :, :prompt],
                new_key=stored.keys[0, :, prompt:],
                new_value=stored.values[0, :, prompt:],
                positions=picked,
                gradient=torch.zeros(len(picked), *trace.output.shape[2:]),
                projection=projection,
                output_norm=output.norm(dim=-1),
                exact=continuation.exact,
                scaling=trace.scaling,
            )
        )
    text = encoded.modality[0] == Modality.TEXT
    return Traced(continuation, prompt, text, rows, observer.window_query)


def runtime_passes(continuation: Continuation) -> Iterator[tuple[int, int]]:
    """The passes of a conversation: later questions at once (`exact` marks their last row)."""
    exact_ends = set(continuation.rows[continuation.exact].tolist())
    predicting = set(continuation.rows.tolist())
    start = 0
    for position in range(len(continuation.ids)):
        if position in exact_ends or (position in predicting and start == position):
            yield start, position + 1
            start = position + 1


@pytest.mark.parametrize("text_prior", [0.0, 0.5])
@pytest.mark.parametrize("ratio", [0.13, 0.3])
def test_static_tokens_judged_are_those_the_runtime_keeps(
    tiny: tuple[Any, Any],
    sample: Any,
    traced: Traced,
    ratio: float,
    text_prior: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = tiny
    profile = uniform_profile(model, "static", budget=ratio, pool=7)
    strategy = replace(profile.strategies[0], text_prior=text_prior)
    profile = replace(profile, strategies=(strategy, profile.strategies[1]))
    share = float(profile.allocation(ratio, traced.tokens, 4).ratio[0, 0])
    judged: list[Tensor] = []

    def remember(*arguments: Any) -> Tensor:
        judged.append(select_tokens(*arguments))
        return judged[-1]

    monkeypatch.setattr(statistics, "select_tokens", remember)
    for layer, rows in enumerate(traced.rows):
        window = traced.window[layer]
        layer_losses(rows, window, (strategy,), (share,), profile.keep, {}, traced.text, 4)
    inputs = processor.encode([sample.messages]).to(model.device, model.dtype)
    with torch.no_grad(), apply(model, profile, budget=ratio) as handle:
        cache = handle.new_cache()
        model(**inputs, **with_cache(model, cache))
    places = [(layer, head) for layer in range(6) for head in range(4)]
    assert len(judged) == len(places)
    for (layer, head), kept in zip(places, judged, strict=True):
        stored = cache.covered[layer].ragged.storage.keys(head)
        assert len(kept) < 0.4 * traced.tokens
        assert torch.equal(traced.rows[layer].key[head, kept], stored), (layer, head)


@pytest.mark.parametrize(
    ("kind", "index", "ratio"),
    [("static", "mean", 0.2), ("dynamic", "mean", 0.45), ("dynamic", "minmax", 0.5)],
)
def test_losses_are_those_of_the_runtime_at_the_first_layer(
    tiny: tuple[Any, Any], sample: Any, traced: Traced, kind: str, index: str, ratio: float
) -> None:
    """Inputs of the first layer do not depend on compression: its real change can be measured."""
    model, processor = tiny
    profile = uniform_profile(model, kind, budget=ratio, pool=7, index=index, chunk=8)
    strategy = profile.strategies[HeadType[kind.upper()]]
    share = float(profile.allocation(ratio, traced.tokens, 4).ratio[0, 0])
    rows, ids = traced.rows[0], traced.continuation.ids
    expected = layer_losses(
        rows, traced.window[0], (strategy,), (share,), profile.keep, {}, traced.text, 4
    )
    inputs = processor.encode([sample.messages]).to(model.device, model.dtype)
    view = view_model(model)
    dense = run_first_layer(model, view, inputs, ids, [(0, len(ids))], None)
    passes = list(runtime_passes(traced.continuation))
    assert max(end - start for start, end in passes) > 5  # there are later questions
    # Losses are of what the prompt keeps: what comes after it stays whole.
    whole = {"smoothing": 0.0, "compress_every": 0}
    with apply(model, profile, budget=ratio, **whole) as handle:
        cache = handle.new_cache()
        pruned = run_first_layer(model, view, inputs, ids, passes, cache)
        assert cache.receipt().compressed_layers == 6
    picked, group, dim = traced.continuation.rows, view.grid.group, view.grid.head_dim
    change = (dense[picked] - pruned[picked[picked < len(pruned)]]).double()
    for head in range(view.grid.kv_heads):
        mine = slice(head * group * dim, (head + 1) * group * dim)
        lost = (change[:, mine] @ rows.projection[:, mine].double().T).norm(dim=-1)
        measured = lost / rows.output_norm.double()
        assert float(expected.output[0, head, 0]) == pytest.approx(
            float(measured.mean()), rel=2e-3, abs=1e-5
        )
        assert float(expected.square[0, head, 0]) == pytest.approx(
            float((measured**2).mean()), rel=4e-3, abs=1e-8
        )
    assert float(expected.output.max()) > 0.01


def run_first_layer(
    model: Any,
    view: Any,
    inputs: dict[str, Tensor],
    ids: Tensor,
    passes: list[tuple[int, int]],
    cache: Any,
) -> Tensor:
    """Heads' outputs of the first layer for the continuation, [positions, query_heads * dim]."""
    seen: list[Tensor] = []
    hook = view.attention[0].o_proj.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0][0].detach())
    )
    try:
        with torch.no_grad():
            cache = cache_of(model(**inputs, **with_cache(model, cache), use_cache=True))
            seen.clear()
            for start, end in passes:
                model(input_ids=ids[None, start:end], **with_cache(model, cache))
    finally:
        hook.remove()
    return torch.cat(seen)
