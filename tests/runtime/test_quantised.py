"""Tokens in fewer bits within a cache: against dense attention to what their rows give back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.calls import with_cache
from hkvprof.profile.costs import static_bytes, static_layout
from hkvprof.profile.record import Profile
from hkvprof.runtime import measure_storage
from hkvprof.runtime.attention import segment_positions
from hkvprof.runtime.kernels import Extents, QuantisedRows
from hkvprof.runtime.kernels.reference import TorchKernels, TorchRetrieval
from hkvprof.runtime.options import Options
from hkvprof.runtime.packing import Packed, Rule, in_order, repack_static
from hkvprof.selection.residents import Residents, quantised
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.reference import masked_cache, masked_step
from tests.runtime.test_forecast import measured
from tests.runtime.test_rows import passes
from tests.runtime.test_tail import check_cache

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
BITS = [8, 4]
SINKS, RECENT = 4, 8
"""Of profiles by default."""
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


def in_bits(model: Any, bits: int, types: Any = "static", **options: Any) -> Profile:
    """A uniform profile whose heads keep tokens in so many bits."""
    made = uniform_profile(model, types, **options)
    static, dynamic = made.strategies
    menu = (replace(static, resident_bits=bits), replace(dynamic, resident_bits=max(bits, 8)))
    return replace(made, strategies=menu)


def located(stored: Tensor, dense: Tensor) -> list[int]:
    """Positions of the nearest dense keys, each once."""
    distance = torch.cdist(stored.double(), dense.double())
    found = [int(place) for place in distance.argmin(dim=1)]
    assert len(set(found)) == len(found)
    assert bool((distance.amin(dim=1) < 0.3 * dense.double().norm(dim=-1).mean()).all())
    return found


def replaced(cache: Any, dense: Any, starts: list[int], bits: int) -> list[list[list[set[int]]]]:
    """Put what `quantised` gives back into a dense cache; the positions that heads kept.

    Tokens are found by their stored keys, and named by the layer in the same order.
    """
    kept = []
    for layer, other in zip(cache.covered, dense.layers, strict=True):
        ragged = layer.ragged
        kept.append([[set() for _ in range(ragged.kv_heads)] for _ in starts])
        for segment in range(ragged.storage.segments):
            row, head = divmod(segment, ragged.kv_heads)
            key, value = other.keys[row, head], other.values[row, head]
            places = located(ragged.resident(segment)[0], key)
            assert places == ragged.known_positions(segment).tolist()
            assert min(places) >= starts[row]
            few = places[: ragged.quantised.count(segment)]
            assert few == sorted(few)
            assert len(few) > 0
            start, middle = starts[row], (SINKS, len(key) - starts[row] - RECENT)
            given = quantised(key[start:], value[start:], bits, *middle)
            for part, whole in zip((key, value), given, strict=True):
                part[few] = whole[[place - start for place in few]]
            kept[-1][row][head] = set(places)
    return kept


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lengths", [[300], [300, 150, 231]])
@torch.no_grad()
def test_steps_are_attention_to_what_rows_give_back(
    llama: Any, bits: int, lengths: list[int]
) -> None:
    ids, mask = left_padded(lengths)
    more = token_ids(len(lengths), 5, seed=2)
    dense = masked_cache(llama)
    llama(input_ids=ids, attention_mask=mask, **with_cache(llama, dense))
    with apply(llama, in_bits(llama, bits), budget=0.25, compress_every=0) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        kept = replaced(cache, dense, [max(lengths) - n for n in lengths], bits)
        steps, found = [], []
        for one in more.split(1, dim=1):
            mask = torch.cat([mask, torch.ones_like(one)], dim=1)
            steps.append({"input_ids": one, "attention_mask": mask})
            found.append(llama(**steps[-1], **with_cache(llama, cache)).logits)
        assert measure_storage(cache) == (cache.receipt().resident_bytes, 0)
    for step, logits in zip(steps, found, strict=True):
        wanted = masked_step(llama, dense, kept, ids.shape[1], **step)
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("hidden", [0, 100])
@torch.no_grad()
def test_a_turn_in_one_pass_is_the_turn_token_by_token(llama: Any, bits: int, hidden: int) -> None:
    """Also where its mask hides tokens in the middle of what was kept."""
    ids, mask = left_padded([300, 231])
    turn = token_ids(2, 6, seed=9)
    both = torch.cat([mask, torch.ones_like(turn)], dim=1)
    places = (both.cumsum(1) - 1).clamp(min=0)[:, 300:]
    both[:, 150 : 150 + hidden] = 0
    with apply(llama, in_bits(llama, bits), budget=0.2, compress_every=0) as handle:
        caches = [handle.new_cache() for _ in range(2)]
        for cache in caches:
            llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        together = llama(
            input_ids=turn, attention_mask=both, position_ids=places, **with_cache(llama, caches[0])
        ).logits
        for i in range(6):
            one = llama(
                input_ids=turn[:, i : i + 1], attention_mask=both[:, : 301 + i],
                position_ids=places[:, i : i + 1], **with_cache(llama, caches[1]),
            ).logits  # fmt: skip
            torch.testing.assert_close(together[:, i : i + 1], one, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_hidden_tokens_in_fewer_bits_are_masked_exactly(llama: Any, bits: int) -> None:
    """A step that hides kept tokens is the dense step over the others, one token or several."""
    ids = token_ids(1, 300)
    dense = masked_cache(llama)
    llama(input_ids=ids, **with_cache(llama, dense))
    with apply(llama, in_bits(llama, bits), budget=0.25, compress_every=0) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, cache))
        kept = replaced(cache, dense, [0], bits)
        hidden = set(range(20, 200))
        mask = torch.ones(1, 301, dtype=torch.long)
        mask[:, sorted(hidden)] = 0
        step = {"input_ids": token_ids(1, 1, seed=4), "position_ids": torch.tensor([[300]])}
        found = llama(**step, attention_mask=mask, **with_cache(llama, cache)).logits
    left = [[[head - hidden for head in row] for row in layer] for layer in kept]
    wanted = masked_step(llama, dense, left, 300, **step)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_rows_of_a_batch_are_prompts_alone_over_compressions(llama: Any, bits: int) -> None:
    lengths = [400, 40, 150, 231]
    ids, mask = left_padded(lengths)
    forced = token_ids(4, 50, seed=3)
    with apply(llama, in_bits(llama, bits), budget=0.3, compress_every=16) as handle:
        batch = handle.new_cache()
        together = passes(llama, batch, ids, mask, forced)
        assert batch.receipt().layers[0].compressions > 3
        assert measure_storage(batch) == (batch.receipt().resident_bytes, 0)
        for row, length in enumerate(lengths):
            alone = handle.new_cache()
            one = ids[row : row + 1, 400 - length :]
            found = passes(llama, alone, one, torch.ones_like(one), forced[row : row + 1])
            difference = (found[0] - together[row]).abs().max()  # of a code that rounds elsewhere
            assert difference < 0.02 * together[row].abs().max()


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_long_generation_stays_within_its_budget(llama: Any, bits: int) -> None:
    with apply(llama, in_bits(llama, bits), budget=0.2) as handle:
        cache = handle.new_cache()
        llama(input_ids=token_ids(1, 500), **with_cache(llama, cache))
        before = {s: cache.covered[0].ragged.quantised.of_segment(s) for s in range(2)}
        for one in token_ids(1, 150, seed=2).split(1, dim=1):
            check_cache(cache)
            llama(input_ids=one, **with_cache(llama, cache))
        check_cache(cache)
        assert cache.receipt().layers[0].compressions > 4
        for segment, old in before.items():
            new = cache.covered[0].ragged.quantised.of_segment(segment)
            assert torch.equal(new.mean, old.mean)
            kept = {row.numpy().tobytes() for row in old.rows}
            assert len(kept & {row.numpy().tobytes() for row in new.rows}) > 0.4 * len(kept)


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_beams_copies_and_cuts(llama: Any, bits: int) -> None:
    ids, mask = left_padded([190, 160, 175])
    order, token = torch.tensor([2, 0, 0]), torch.tensor([[7], [8], [9]])
    full = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    with apply(llama, in_bits(llama, bits), budget=0.3) as handle:
        cache, plain = handle.new_cache(), handle.new_cache()
        for one in (cache, plain):
            llama(input_ids=ids, attention_mask=mask, **with_cache(llama, one))
        cache.reorder_cache(order)
        branch = copy.deepcopy(cache)
        step = {"input_ids": token[order], "attention_mask": full[order]}
        llama(input_ids=token, attention_mask=full[order], **with_cache(llama, cache))
        cache.crop(-1)
        found = [llama(**step, **with_cache(llama, one)).logits for one in (cache, branch)]
        wanted = llama(input_ids=token, attention_mask=full, **with_cache(llama, plain)).logits
        assert measure_storage(branch) == (branch.receipt().resident_bytes, 0)
        assert measure_storage(cache) == (cache.receipt().resident_bytes, 0)
        with pytest.raises(CompressionError, match="tokens since the last compression"):
            cache.crop(-5)
        beams = llama.generate(input_ids=ids[:1], num_beams=3, max_new_tokens=30, **GREEDY)
    assert beams.shape[1] == 220
    for one in found:
        torch.testing.assert_close(one, wanted[order], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_bytes_are_freed_in_every_dtype(bits: int, dtype: torch.dtype) -> None:
    """As many bytes, more tokens."""
    model = random_llama().to(dtype)
    receipts = {}
    for kept in (16, bits):
        with apply(model, in_bits(model, kept), budget=0.2) as handle:
            cache = handle.new_cache()
            logits = model(input_ids=token_ids(1, 600), **with_cache(model, cache)).logits
            step = model(input_ids=token_ids(1, 1, seed=5), **with_cache(model, cache)).logits
            assert bool(logits.isfinite().all() and step.isfinite().all())
            receipts[kept] = cache.receipt()
            assert measure_storage(cache)[0] == receipts[kept].resident_bytes
    exact, few = ([h for one in r.layers for h in one.heads] for r in receipts.values())
    assert receipts[bits].resident_bytes <= 0.22 * receipts[bits].dense_bytes
    assert few[0].tokens_resident > (1.4 if bits == 8 else 2.2) * exact[0].tokens_resident
    assert few[0].strategy.endswith(f"-int{bits}")


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_whole_budget_is_the_stock_cache(llama: Any, bits: int) -> None:
    ids = token_ids(1, 100)
    expected = llama.generate(input_ids=ids, max_new_tokens=9, **GREEDY)
    with apply(llama, in_bits(llama, bits), budget=1.0) as handle:
        assert torch.equal(llama.generate(input_ids=ids, max_new_tokens=9, **GREEDY), expected)
        assert handle.receipt().compressed_layers == 0


# -- the parts ----------------------------------------------------------------------------------

DIMS = [8, 24, 64, 80, 128]
KEEP = KeepRule(3, 5, 8)


def random_tokens(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, count, dim, generator=generator)
    return key + 5 * torch.randn(dim, generator=generator), value


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS), dim=st.sampled_from(DIMS), ratio=st.floats(0.01, 0.9),
    tokens=st.integers(1, 120), turns=st.lists(st.integers(1, 40), max_size=4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_again_and_again(
    bits: int, dim: int, ratio: float, tokens: int, turns: list[int], seed: int
) -> None:
    """Kept are the best by what is stored; rows stay as they were; bytes are those foreseen."""
    strategy = Strategy(HeadType.STATIC, resident_bits=bits)
    rule = Rule(strategy, ratio, KEEP, Options(), None, 1.0)
    total = tokens + sum(turns)
    keys, values = random_tokens(total, dim, seed)
    score = torch.rand(total, generator=torch.Generator().manual_seed(seed))
    seen, places, packed = 0, torch.empty(0, dtype=torch.long), Packed(keys[:0], values[:0], "")
    for new in (tokens, *turns):
        before, old = packed.held, places
        count = 0 if before is None else len(before.rows)
        places = torch.cat([places, torch.arange(seen, seen + new)])
        order = in_order(count, KEEP.sinks, len(places))
        key = torch.cat([packed.key, keys[seen : seen + new]])
        value = torch.cat([packed.value, values[seen : seen + new]])
        if before is not None:
            few = before.decode()
            key, value = torch.cat([few[0], key]), torch.cat([few[1], value])
        places, key, value, seen = places[order], key[order], value[order], seen + new
        assert places.tolist() == sorted(places.tolist())
        here = places
        packed = repack_static(
            rule, lambda at=here: score[None, at], key, value, seen, None, before
        )
        assert packed.kept is not None
        places = places[packed.kept]
        layout = static_layout(strategy, ratio, seen, KEEP, dim, 4)
        few_count = 0 if packed.held is None else len(packed.held.rows)
        assert few_count <= layout.quantised
        assert len(packed.key) <= layout.exact
        _check_choice(here.tolist(), places.tolist(), few_count, score, layout.tokens)
        assert torch.equal(packed.key, keys[places[few_count:]])
        assert torch.equal(packed.value, values[places[few_count:]])
        if packed.held is not None:
            _check_rows(packed.held, before, places, old, (keys[:seen], values[:seen]))
        if few_count == layout.quantised and len(packed.key) == layout.exact:
            held = 0 if packed.held is None else packed.held.nbytes + 12
            assert held + packed.key.nbytes * 2 == static_bytes(strategy, layout, dim, 4)


def _check_choice(among: list[int], places: list[int], few: int, score: Tensor, count: int) -> None:
    ends = {*among[: KEEP.sinks], *among[len(among) - KEEP.recent :]}
    if len(among) <= KEEP.recent:
        ends = set(among)
    others = sorted(set(among) - ends, key=lambda place: (-float(score[place]), place))
    wanted = others[: max(0, min(count, len(among)) - len(ends))]
    assert places[:few] == sorted(wanted)
    assert places[few:] == sorted(ends)


def _check_rows(
    held: Residents,
    before: Residents | None,
    places: Tensor,
    old: Tensor,
    dense: tuple[Tensor, Tensor],
) -> None:
    """Rows of tokens that stay are as they were, others of the segment's mean."""
    if before is None:
        if not len(old):
            middle = slice(KEEP.sinks, len(dense[0]) - KEEP.recent)
            mean = torch.stack([part[middle].mean(dim=0) for part in dense])
            torch.testing.assert_close(held.mean, mean)
        before = replace(held, rows=held.rows[:0])
    assert torch.equal(held.mean, before.mean)
    known = dict(zip(old[: len(before.rows)].tolist(), before.rows, strict=True))
    few = places[: len(held.rows)]
    for number, place in enumerate(few.tolist()):
        if place in known:
            assert torch.equal(held.rows[number], known[place])
    fresh = replace(before, rows=before.encode(dense[0][few], dense[1][few])).decode()
    for mine, other in zip(held.decode(), fresh, strict=True):
        step = float(other.abs().max()) / 7
        torch.testing.assert_close(mine, other, atol=step, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    dim=st.sampled_from(DIMS), seed=st.integers(0, 99),
    segments=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 30), st.sampled_from(BITS)),
        min_size=1, max_size=6,
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_flat_rows_and_attention_to_them(
    dim: int, seed: int, segments: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    """Whatever lies beside what, a segment's output is dense attention to its decoded tokens."""
    held, exact = {}, []
    for number, (stored, few, bits) in enumerate(segments):
        exact.append([part.to(dtype) for part in random_tokens(stored, dim, seed + number)])
        if few:
            given = [part.to(dtype) for part in random_tokens(few, dim, seed - 1 - number)]
            held[number] = Residents.around(*given, bits).append(*given)
    flat = QuantisedRows.of(held)
    lengths = [stored for stored, _, _ in segments]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    keys, values = (torch.cat(parts) for parts in zip(*exact, strict=True))
    query = torch.randn(len(segments), 3, dim, generator=torch.Generator().manual_seed(seed))
    extents, query = Extents.of(starts, lengths), query.to(dtype)
    out = TorchKernels().attend(keys, values, extents, query, dim**-0.5, flat)
    for number, (stored, few, _) in enumerate(segments):
        key, value = exact[number]
        if few:
            assert flat is not None
            entry = list(held).index(number)
            found, wanted = flat.of_segment(number), held[number]
            assert found is not None
            assert torch.equal(found.rows, wanted.rows)
            assert flat.places[entry].tolist() == [number, flat.starts[entry], few]
            assert flat.nbytes(number) == wanted.nbytes + 12
            key, value = (
                torch.cat(pair) for pair in zip(wanted.decode(), exact[number], strict=True)
            )
        if not stored + few:
            assert not out[number].any()
            continue
        logits = query[number].double() @ key.double().T * dim**-0.5
        wanted_out = logits.softmax(-1) @ value.double()
        rough = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}[dtype]
        torch.testing.assert_close(out[number].double(), wanted_out, atol=rough, rtol=rough)
    if flat is not None:
        again = flat.take([0, len(segments) - 1, 0])
        for new, number in enumerate([0, len(segments) - 1, 0]):
            mine, other = flat.of_segment(number), None if again is None else again.of_segment(new)
            assert (mine is None) == (other is None)
            assert mine is None or other is None or torch.equal(mine.rows, other.rows)


# -- dynamic heads ------------------------------------------------------------------------------


def hot_in_bits(model: Any, kind: str) -> Profile:
    """All heads dynamic, their hot items in 8 bits: chunks of 4, or single tokens that are ranked
    again by their keys."""
    if kind == "chunks":
        return in_bits(model, 8, "dynamic", chunk=4)
    index = Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=16, resident_bits=8)
    return measured(model, (index,))


@pytest.mark.parametrize("host_dtype", ["same", "int8"])
@pytest.mark.parametrize("kind", ["chunks", "tokens"])
@torch.no_grad()
def test_hot_items_are_rows(llama: Any, kind: str, host_dtype: str) -> None:
    """Every slot holds the row of the item that its map names, over steps, joins and beams; what is
    attended to is what rows give back, and receipts tell what is there."""
    ids, mask = left_padded([300, 231])
    profile, options = hot_in_bits(llama, kind), {"host_dtype": host_dtype, "compress_every": 12}
    with apply(llama, profile, budget=0.35, **options) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        check_hot(cache)
        for step, one in enumerate(token_ids(2, 30, seed=2).split(1, dim=1)):
            mask = torch.cat([mask, torch.ones_like(one)], dim=1)
            llama(input_ids=one, attention_mask=mask, **with_cache(llama, cache))
            if step == 14:
                cache.reorder_cache(torch.tensor([1, 0]))
                cache, mask = copy.deepcopy(cache), mask[[1, 0]]
        check_hot(cache)
        check_cache(cache)
        receipt = cache.receipt()
        assert receipt.layers[0].compressions > 2
        assert 0 < receipt.hit_rate < 1
        assert receipt.bytes_moved > 0


def check_hot(cache: Any) -> None:
    for layer in cache.covered:
        ragged = layer.ragged
        assert ragged.dynamic
        for segment, head in ragged.dynamic.items():
            held = ragged.quantised.of_segment(segment)
            items, chunk = head.slots.long(), head.layout.chunk
            assert len(set(items.tolist())) == head.layout.hot
            assert len(held.rows) == head.layout.hot * chunk
            if head.host.coder is None:
                wanted = held.encode_items(*head.host.fetch(items, items.device).unbind(1))
                near = replace(held, rows=wanted.flatten(0, 1)).decode()[0] - held.decode()[0]
                assert near.abs().max() < 0.05 * held.decode()[0].abs().max()
            else:
                assert torch.equal(head.host.coder.mean, held.mean)
                assert torch.equal(head.host.data[items].flatten(0, 1), held.rows)
            tail = ragged.storage.lengths[segment] - head.hot_start
            assert tail == ragged.seen - _moved(ragged, segment)


def _moved(ragged: Any, segment: int) -> int:
    """Position after the last token that is stored by the head's layout."""
    layout = ragged.dynamic[segment].layout
    start = ragged.start(segment // ragged.kv_heads)
    return start + layout.sinks + layout.items * layout.chunk + layout.recent


@pytest.mark.parametrize("hidden", [0, 160])
@pytest.mark.parametrize("kind", ["chunks", "tokens"])
@torch.no_grad()
def test_steps_attend_to_hot_rows_and_turns_to_everything(
    llama: Any, kind: str, hidden: int
) -> None:
    """A step is dense attention to what is stored at the positions that the layer names, but for
    what a mask hides; a pass of several tokens is exact."""
    ids, turn = token_ids(1, 300), token_ids(1, 7, seed=3)
    dense, exact = masked_cache(llama), masked_cache(llama)
    for one in (dense, exact):
        llama(input_ids=ids, **with_cache(llama, one))
    mask = torch.ones(1, 301, dtype=torch.long)
    mask[:, 20 : 20 + hidden] = 0
    step = {"input_ids": turn[:, :1], "position_ids": torch.tensor([[300]])}
    with apply(llama, hot_in_bits(llama, kind), budget=0.35, compress_every=0) as handle:
        cache, other = handle.new_cache(), handle.new_cache()
        for one in (cache, other):
            llama(input_ids=ids, **with_cache(llama, one))
        found = llama(**step, attention_mask=mask, **with_cache(llama, cache)).logits
        turned = llama(input_ids=turn, **with_cache(llama, other)).logits
        kept = restored(cache, dense, set(range(20, 20 + hidden)))
    wanted = masked_step(llama, dense, kept, 300, **step)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    wanted = llama(input_ids=turn, **with_cache(llama, exact)).logits
    torch.testing.assert_close(turned, wanted, atol=2e-4, rtol=1e-4)


def restored(cache: Any, dense: Any, hidden: set[int]) -> list[list[list[set[int]]]]:
    """Put what hot rows give back into a dense cache of one row; what is seen of the prompt."""
    kept = []
    for layer, other in zip(cache.covered, dense.layers, strict=True):
        kept.append([[]])
        for head in range(layer.ragged.kv_heads):
            places = segment_positions(layer.ragged, head, resident=True).tolist()
            few, (key, value) = layer.ragged.quantised.count(head), layer.ragged.resident(head)
            assert few
            for mine, stored in ((other.keys, key), (other.values, value)):
                whole = mine[0, head, places[:few]]
                assert (stored[:few] - whole).norm() < 0.02 * whole.norm()
                mine[0, head, places[:few]] = stored[:few]
                assert torch.equal(mine[0, head, places[few:-1]], stored[few:-1])
            kept[-1][0].append(set(places[:-1]) - hidden)
    return kept


class FromHost(TorchRetrieval):
    """Reads the keys of all candidates from the host, hot or not."""

    def _keys(self, number: int, items: Tensor) -> Tensor:
        self.reads[number] += len(items)
        return self._items(self.heads[number], items)[:, 0, 0]


@torch.no_grad()
def test_hot_keys_are_not_read_again(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same selection to the bit, and fewer bytes."""
    strategy = Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=16)
    monkeypatch.setattr("hkvprof.runtime.ragged.for_device", lambda *_: TorchKernels())
    receipts, logits = [], []
    for kind in (TorchRetrieval, FromHost):
        monkeypatch.setattr("hkvprof.runtime.kernels.reference.TorchRetrieval", kind)
        with apply(llama, measured(llama, (strategy,)), budget=0.3) as handle:
            cache = handle.new_cache()
            llama(input_ids=token_ids(1, 300), **with_cache(llama, cache))
            steps = token_ids(1, 8, seed=4).split(1, dim=1)
            logits.append(
                [llama(input_ids=one, **with_cache(llama, cache)).logits for one in steps]
            )
            receipts.append(cache.receipt())
    assert all(torch.equal(mine, other) for mine, other in zip(*logits, strict=True))
    mine, other = ([head for one in r.layers for head in one.heads] for r in receipts)
    item, reads = 2 * 16 * 4, 0
    for head, whole in zip(mine, other, strict=True):
        assert head.chunks_fetched == whole.chunks_fetched
        candidates = whole.chunks_requested + 8 * 16  # of the layouts, 16 more in every step
        assert whole.bytes_moved == whole.chunks_fetched * item + candidates * item // 2
        reads += head.bytes_moved - head.chunks_fetched * item
    assert 0 < reads < 0.7 * sum(whole.bytes_moved - whole.chunks_fetched * item for whole in other)
