"""Static heads whose score asks the profile's queries: the tokens that the definition names, for
every way of filling a cache; and those that calibration judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration import losses, recipe
from hkvprof.calibration.calibrate import Run
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.errors import HkvWarning, ModelError
from hkvprof.heads import CALIBRATED, WINDOW, HeadType, Strategy
from hkvprof.models.adapter import view_model
from hkvprof.models.attention import hooked_attention
from hkvprof.models.calls import with_cache
from hkvprof.models.rotary import rotary_module, turning
from hkvprof.profile.queries import QueryTables
from hkvprof.profile.record import Profile
from hkvprof.runtime import measure_storage
from hkvprof.selection.static import QueryCentres, select_tokens
from hkvprof.testbed.generator import make_sample
from tests.models.conversations import picture, user
from tests.models.families import processor_of, words
from tests.models.tiny import build_covered
from tests.models_for_tests import apply, left_padded, token_ids
from tests.runtime.test_forecast import measured

STATIC = Strategy(HeadType.STATIC, score=CALIBRATED)
MENU = (STATIC, replace(STATIC, pool=7), replace(STATIC, pool=7, resident_bits=8))


def queries_of(model: Any) -> QueryTables:
    """Random centres, large enough that scores differ."""
    view, random = view_model(model), np.random.default_rng(0)
    turns = turning(model, view)
    assert turns is not None
    grid = view.grid
    shape = (grid.layers, grid.query_heads, 3)
    return QueryTables(
        centres=random.normal(size=(*shape, grid.head_dim)).astype(np.float16),
        weights=np.tile(np.float32([0.5, 0.25, 0.25]), (*shape[:2], 1)),
        frequency=turns.frequency,
    )


def profile_of(model: Any, menu: tuple[Strategy, ...] = MENU) -> Profile:
    plain = tuple(replace(strategy, score=WINDOW) for strategy in menu)
    return replace(measured(model, plain), strategies=menu, queries=queries_of(model))


def turned_by_the_model(model: Any, x: Tensor, position: int) -> Tensor:
    """Vectors [rows, dim] at a text position, with cosine and sine that the model makes itself."""
    view = view_model(model)
    axes = 3 if "mrope_section" in (view.text_config.rope_parameters or {}) else 1
    ids = torch.full((axes, 1, 1), position) if axes > 1 else torch.tensor([[position]])
    rotary = rotary_module(model, view)
    assert rotary is not None
    cosine, sine = rotary(torch.zeros(1, 1, 1), ids)
    width = cosine.shape[-1]  # of M-RoPE in some releases three, alike for text
    cosine, sine = (part.flatten()[-width:] for part in (cosine, sine))
    part, rest = x[..., :width], x[..., width:]
    first, second = part.chunk(2, dim=-1)
    turned = part * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, rest], dim=-1)


def best(model: Any, profile: Profile, layer: int, head: int, key: Tensor, position: int,
         pool: int, count: int) -> set[int]:  # fmt: skip
    """Numbers of the best keys by the definition, sinks and recent ones first."""
    group, queries, keep = profile.grid.group, profile.queries, profile.keep
    assert queries is not None
    score = torch.zeros(len(key))
    for one in range(head * group, (head + 1) * group):
        centres = torch.from_numpy(queries.centres[layer, one].astype(np.float32))
        asked = turned_by_the_model(model, centres, position)
        weights = (asked @ key.T * key.shape[1] ** -0.5).softmax(-1)
        score += torch.from_numpy(queries.weights[layer, one].copy()) @ weights
    near = range(-(pool // 2), pool // 2 + 1)
    pooled = torch.stack(
        [torch.stack([score[i + j] for j in near if 0 <= i + j < len(key)]).mean()
         for i in range(len(key))]
    )  # fmt: skip
    pooled[: keep.sinks] = pooled[len(key) - keep.recent :] = torch.inf
    return set(pooled.topk(count).indices.tolist())


@torch.no_grad()
def check(model: Any, profile: Profile, cache: Any, inputs: dict[str, Tensor], ahead: int) -> None:
    """Every head of a compressed prompt; `ahead` is by how much the next position is above the
    number of a row's tokens."""
    from transformers.cache_utils import DynamicCache

    dense = DynamicCache(config=model.config.get_text_config())
    model(**inputs, **with_cache(model, dense))
    for number, layer in enumerate(cache.covered):
        ragged = layer.ragged
        for segment in range(ragged.storage.segments):
            row, head = divmod(segment, ragged.kv_heads)
            plan, start = ragged.rows[row].plan, ragged.start(row)
            kept = set((ragged.known_positions(segment) - start).tolist())
            key = dense.layers[layer.account.layer].keys[row, head, start:]
            pool = plan.layers[number][head].strategy.pool
            position = len(key) + ahead
            wanted = best(model, profile, number, head, key, position, pool, len(kept))
            assert len(kept & wanted) >= len(kept) - 1  # rounding may exchange two
    assert measure_storage(cache) == (cache.receipt().resident_bytes, 0)


def filled(model: Any, profile: Profile, inputs: dict[str, Tensor], **options: Any) -> Any:
    with apply(model, profile, budget=0.3, **options) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(**inputs, **with_cache(model, cache))
        return cache


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "qwen3", "gpt-neox"])
def test_a_prompt_keeps_what_the_queries_ask_for(name: str) -> None:
    model = build_covered(name).eval()
    profile, inputs = profile_of(model), {"input_ids": token_ids(1, 200, vocabulary=128)}
    check(model, profile, filled(model, profile, inputs), inputs, 0)


def test_padded_rows_have_positions_of_their_own() -> None:
    """With the model's count and, where nobody says, with one that includes the padding."""
    model = build_covered("llama").eval()
    profile, (ids, mask) = profile_of(model), left_padded([260, 180])
    own = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    inputs = {"input_ids": ids, "attention_mask": mask, **own}
    check(model, profile, filled(model, profile, inputs), inputs, 0)
    short = {"input_ids": ids[1:], "attention_mask": mask[1:]}
    check(model, profile, filled(model, profile, short), short, 80)


@torch.no_grad()
def test_a_prompt_in_chunks_is_scored_as_a_whole() -> None:
    model = build_covered("llama").eval()
    profile, ids = profile_of(model), token_ids(1, 300, vocabulary=128)
    whole = filled(model, profile, {"input_ids": ids})
    with apply(model, profile, budget=0.3) as handle:
        cache = handle.new_cache()
        model.generate(
            ids, **with_cache(model, cache), max_new_tokens=2, do_sample=False,
            prefill_chunk_size=70,
        )  # fmt: skip
    for ours, theirs in zip(cache.covered, whole.covered, strict=True):
        for segment in range(theirs.ragged.storage.segments):
            kept = theirs.ragged.known_positions(segment)
            assert set(ours.ragged.known_positions(segment)) == {*kept, 300}


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_images_put_the_next_position_behind_their_axes(name: str) -> None:
    model = build_covered(name).eval()
    processor, _ = processor_of(name, model)
    message = user(picture(56, 56), words(40), picture(56, 28, 1), words(60, 1))
    inputs = processor.encode([[message]]).to(model.device, model.dtype)
    profile = profile_of(model)
    cache = filled(model, profile, inputs)
    delta = int(cache.conversation.rope_deltas)
    assert delta < 0
    check(model, profile, cache, inputs, delta)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(keys, position) of every score that is computed."""
    seen: list[tuple[int, int]] = []
    own = QueryCentres.attention

    def attention(self: QueryCentres, key: Tensor, position: int, *others: Any) -> Tensor:
        seen.append((key.shape[1], position))
        return own(self, key, position, *others)

    monkeypatch.setattr(QueryCentres, "attention", attention)
    return seen


@torch.no_grad()
def test_later_compressions_ask_from_where_the_row_ends(asked: list[tuple[int, int]]) -> None:
    model = build_covered("llama").eval()
    ids = token_ids(1, 330, vocabulary=128)
    with apply(model, profile_of(model), budget=0.3, compress_every=16) as handle:
        cache = handle.new_cache()
        model(input_ids=ids[:, :300], **with_cache(model, cache))
        assert set(asked) == {(300, 300)}
        asked.clear()
        for token in ids[:, 300:].split(1, dim=1):
            model(input_ids=token, **with_cache(model, cache))
        assert {position for _, position in asked} == set(range(316, 330, 16))
        held = measure_storage(cache)
        assert held == (cache.receipt().resident_bytes, cache.receipt().host_bytes)


@torch.no_grad()
def test_all_is_kept_to_the_bit_at_the_whole_budget() -> None:
    model = build_covered("llama").eval()
    ids = token_ids(1, 200, vocabulary=128)
    plain = model(input_ids=ids).logits
    with apply(model, profile_of(model), budget=1.0):
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_bytes_are_those_that_the_plan_told() -> None:
    model = build_covered("llama").eval()
    profile, inputs = profile_of(model), {"input_ids": token_ids(1, 200, vocabulary=128)}
    receipt = filled(model, profile, inputs).receipt()
    plan = profile.plan(0.3, 200, 4)
    assert profile.queries is not None
    assert profile.queries.head_bytes(2) == 4 * (2 * 3 * 17 + 8)
    assert receipt.shared_bytes == plan.table_bytes == 4 * profile.queries.head_bytes(2)
    assert receipt.resident_bytes == plan.resident_bytes
    assert {head.strategy for layer in receipt.layers for head in layer.heads} <= {
        "static-calibrated-pool1", "static-calibrated-pool7", "static-calibrated-pool7-int8",
    }  # fmt: skip


def test_a_model_that_tells_no_positions_is_refused() -> None:
    model = build_covered("llama").eval()
    profile = profile_of(model)
    model.model.hidden, model.model.rotary_emb = model.model.rotary_emb, None
    with pytest.raises(ModelError, match="no module `rotary_emb`"):
        apply(model, profile)


# -- calibration ----------------------------------------------------------------------------------


@pytest.fixture
def two_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    menu = (replace(STATIC, pool=7), Strategy(HeadType.DYNAMIC, index="projected", bits=32))
    monkeypatch.setattr(recipe, "MEASURED_MENU", menu)
    monkeypatch.setattr(recipe, "RATIOS", (0.3, 1.0))


@pytest.mark.usefixtures("two_strategies")
def test_tokens_that_calibration_judges_are_those_the_runtime_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    samples = [make_sample("list", i, images=3, split="calibration") for i in range(2)]
    run = Run(ProbedModel.of(model, processor, hkvprof.Recipe()))
    judged: list[Tensor] = []

    def remember(*arguments: Any) -> Tensor:
        judged.append(select_tokens(*arguments))
        return judged[-1]

    with hooked_attention(model):
        tables = run.fit(samples)
        monkeypatch.setattr(losses, "select_tokens", remember)
        probe = Probe(run.probed, samples[0])
        probe.measure(tables)
    profile = profile_of(model, run.probed.strategies[:1])
    profile = replace(profile, queries=tables.queries, keep=run.conditions.keep)
    inputs = processor.encode([samples[0].messages]).to(model.device, model.dtype)
    with torch.no_grad(), apply(model, profile, budget=0.3) as handle:
        cache = handle.new_cache()
        model(**inputs, **with_cache(model, cache))
    heads = profile.grid.kv_heads
    assert len(judged) == profile.grid.total
    for number, kept in enumerate(judged):
        ragged = cache.covered[number // heads].ragged
        found = sorted(ragged.known_positions(number % heads).tolist())
        common = set(found) & set(kept.tolist())
        assert len(common) == min(len(found), len(kept))  # ratios of heads differ by the plan


@pytest.mark.usefixtures("two_strategies")
def test_models_whose_rotation_is_not_known_go_without() -> None:
    settings = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = build_covered("llama", rope_parameters=settings).eval()
    with pytest.warns(HkvWarning, match="scores by the calibration's own queries are left out"):
        probed = ProbedModel.of(model, None, hkvprof.Recipe())  # type: ignore[arg-type]
    assert [one.score for one in probed.strategies] == ["window"]
    assert probed.conditions.strategies == probed.strategies
    assert probed.new_queries() is None
