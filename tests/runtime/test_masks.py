"""Masks of later passes: exactly what is kept and shown, whatever was hidden before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.errors import CompressionError, ModelError
from hkvprof.models.attention import AttentionCall, MarkedLayer
from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from hkvprof.runtime.attention import own_block, read_view, row_starts
from tests.models_for_tests import apply, left_padded, random_llama, token_ids
from tests.runtime.reference import kept_positions
from tests.runtime.test_handle import TYPES, profile_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


class SeeingLayer(MarkedLayer):
    """Dense attention, in float64, to given earlier positions per row and head, under the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[set[int]]] | None = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        if self.kept is None:
            return call.dense()
        rows, _, new, dim = call.query.shape
        heads, tokens = call.key.shape[1], call.key.shape[2]
        visible = torch.zeros(rows, heads, new, tokens, dtype=torch.bool)
        visible[..., tokens - new :] = True
        for row, kept_row in enumerate(self.kept):
            for head, kept in enumerate(kept_row):
                visible[row, head, :, sorted(kept)] = True
        if call.mask is None:
            visible &= torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
        else:
            visible &= call.mask
        query = call.query.view(rows, heads, -1, new, dim).double()
        logits = torch.einsum("bhgqd,bhnd->bhgqn", query, call.key.double()) * call.scaling
        weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(dim=-1)
        out = torch.einsum("bhgqn,bhnd->bhgqd", weights.nan_to_num(0.0), call.value.double())
        return out.flatten(1, 2).transpose(1, 2).to(call.query.dtype), None


def positions_of(mask: Tensor, new: int) -> Tensor:
    """Per row, so that they are not the logical ones; of pads any, but no two alike."""
    pads = 1000 + torch.arange(mask.shape[1])
    return torch.where(mask.bool(), mask.cumsum(1) - 1, pads)[:, -new:]


class Twins:
    """The compressed conversation and its dense reference, pass by pass, under one handle that is
    not strict: keys of the reference's layers lead to their own attention."""

    def __init__(self, model: Any, handle: Any, lengths: list[int]) -> None:
        self.model = model
        self.ids, self.mask = left_padded(lengths)
        self.starts = [max(lengths) - n for n in lengths]
        self.cache = handle.new_cache()
        self.reference = DynamicCache(config=model.config)
        self.reference.layers = [SeeingLayer() for _ in self.reference.layers]
        where = {"position_ids": positions_of(self.mask, max(lengths))}
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, **where}
        model(**inputs, **with_cache(model, self.cache))
        model(**inputs, **with_cache(model, self.reference))

    def pass_over(self, new: int, seed: int, pads: list[int], out: Tensor) -> None:
        """A pass of `new` tokens whose rows end `pads[row]` tokens early, for good; `out` marks
        what is knocked out for this pass alone."""
        rows = len(self.mask)
        ids = token_ids(rows, new, seed)
        own = torch.ones_like(ids)
        for row, count in enumerate(pads[:rows]):
            own[row, new - min(count, new) :] = 0
        self.mask = torch.cat([self.mask, own], dim=1)
        mask = self.mask * ~out[:rows, : self.mask.shape[1]]
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs["position_ids"] = positions_of(self.mask, new)
        got = self.model(**inputs, **with_cache(self.model, self.cache)).logits
        dense: Any = self.reference.layers
        for ours, theirs in zip(self.cache.covered, dense, strict=True):
            theirs.kept = self.seen_by(ours, theirs, new)
        expected = self.model(**inputs, **with_cache(self.model, self.reference)).logits
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        receipt = self.cache.receipt()
        assert measure_storage(self.cache) == (receipt.resident_bytes, receipt.host_bytes)
        if new == 1:
            self.check_hot(mask)

    def seen_by(self, ours: Any, theirs: Any, new: int) -> list[list[set[int]]]:
        earlier = ours.get_seq_length() - new
        if ours.ragged is None:
            return [[set(range(earlier))] * 2] * len(self.mask)
        kept = kept_positions(ours, theirs.keys[:, :, :earlier])
        if new > 1:
            for segment in ours.ragged.dynamic:
                row, head = divmod(segment, 2)
                kept[row][head] = set(range(self.starts[row], earlier))
        return kept

    def check_hot(self, mask: Tensor) -> None:
        """No hot slot holds an item that is hidden while one that is not does without."""
        for layer in self.cache.covered:
            for segment, head in layer.ragged.dynamic.items() if layer.ragged else ():
                row = segment // 2
                first = self.starts[row] + head.layout.sinks
                shown = mask[row, first : first + head.layout.items * head.layout.chunk]
                shown = shown.view(head.layout.items, -1).any(dim=1)
                held = shown[head.slots.long()]
                assert int(held.sum()) == min(int(shown.sum()), head.layout.hot)

    def reorder(self, order: list[int]) -> None:
        rows = [number % len(self.mask) for number in order[: len(self.mask)]]
        for cache in (self.cache, self.reference):
            cache.reorder_cache(torch.tensor(rows))
        self.mask, self.starts = self.mask[rows], [self.starts[row] for row in rows]


OPTIONS: list[dict[str, Any]] = [
    {"budget": 0.35, "compress_every": 16},
    {"budget": 0.5, "compress_every": 0},
    {"budget": 0.4, "compress_every": 16, "smoothing": 0.0},
]
passes = st.tuples(
    st.sampled_from([1, 1, 1, 2, 9, 23]),
    st.integers(0, 9),
    st.lists(st.sampled_from([0, 0, 1, 3, 30]), min_size=3, max_size=3),
    st.sampled_from(["nothing", "nothing", "span", "random", "all but the last"]),
    st.integers(0, 99),
)


def knocked_out(kind: str, seed: int, tokens: int = 500) -> Tensor:
    """[rows, tokens]: what a pass hides beside pads; a prompt's first token is shown or hidden."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(3, tokens, dtype=torch.bool)
    if kind == "span":
        first = int(torch.randint(0, 120, (1,), generator=generator))
        hidden[seed % 3, first : first + 60] = True
    elif kind == "random":
        hidden = torch.rand(3, tokens, generator=generator) < 0.5
    elif kind == "all but the last":
        hidden[seed % 3, :150] = True
    return hidden


@settings(max_examples=25, deadline=None)
@given(
    types=st.sampled_from(TYPES),
    options=st.sampled_from(OPTIONS),
    lengths=st.sampled_from([[150], [150, 131], [150, 120, 139]]),
    turns=st.lists(
        st.one_of(passes, st.lists(st.integers(0, 2), min_size=3, max_size=3)),
        min_size=1,
        max_size=7,
    ),
)
@torch.no_grad()
def test_what_is_kept_and_shown_is_what_is_attended_to(
    llama: Any, types: str, options: dict[str, Any], lengths: list[int], turns: list[Any]
) -> None:
    """Decoding steps, turns, beams, rows that end early, and knock-outs, in any order."""
    with apply(llama, profile_of(llama, types), strict=False, **options) as handle:
        twins = Twins(llama, handle, lengths)
        for turn in turns:
            if isinstance(turn, list):
                twins.reorder(turn)
                continue
            new, seed, pads, kind, other = turn
            twins.pass_over(new, seed, pads, knocked_out(kind, other))


@settings(max_examples=15, deadline=None)
@given(
    budget=st.sampled_from([0.4, 0.97, 1.0]),
    every=st.sampled_from([16, 128]),
    turns=st.lists(passes.filter(lambda one: one[0] > 1), min_size=1, max_size=4),
)
@torch.no_grad()
def test_turns_are_the_dense_models_under_the_same_masks(
    llama: Any, budget: float, every: int, turns: list[Any]
) -> None:
    """Dynamic heads: a pass of several tokens sees all that the mask shows, exactly."""
    ids, mask = left_padded([150, 131])
    dense = DynamicCache(config=llama.config)
    runs: list[tuple[dict[str, Tensor], Tensor]] = []
    for new, seed, pads, kind, other in turns:
        more = torch.ones(2, new, dtype=torch.long)
        for row in range(2):
            more[row, new - min(pads[row], new - 1) :] = 0
        mask = torch.cat([mask, more], dim=1)
        hidden = knocked_out(kind, other)[:2, : mask.shape[1]]
        hidden[:, -new:] = False
        inputs = {"input_ids": token_ids(2, new, seed), "attention_mask": mask * ~hidden}
        runs.append(({**inputs, "position_ids": positions_of(mask, new)}, more.bool()))
    first = {"input_ids": ids, "attention_mask": left_padded([150, 131])[1]}
    llama(**first, **with_cache(llama, dense))
    expected = [llama(**inputs, **with_cache(llama, dense)).logits for inputs, _ in runs]
    options: dict[str, Any] = {"budget": budget, "compress_every": every}
    with apply(llama, profile_of(llama, "dynamic"), **options) as handle:
        cache = handle.new_cache()
        llama(**first, **with_cache(llama, cache))
        got = [llama(**inputs, **with_cache(llama, cache)).logits for inputs, _ in runs]
    for mine, theirs, (_, real) in zip(got, expected, runs, strict=True):
        if budget == 1:
            assert torch.equal(mine, theirs)
        else:
            assert (mine - theirs)[real].abs().max() <= 1e-4 * theirs[real].abs().max()


@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_a_mask_that_hides_nothing_is_no_mask(llama: Any, types: str) -> None:
    """The fast path: bit for bit the same, and nothing is held for it."""
    ids = token_ids(2, 150)
    with apply(llama, profile_of(llama, types), budget=0.4) as handle:
        plain, masked = handle.new_cache(), handle.new_cache()
        for step, new in enumerate((150, 1, 1, 7, 1)):
            part, seen = ids[:, :new], masked.get_seq_length() + new
            shown = torch.ones(2, 1, new, seen, dtype=torch.bool).tril(seen - new)
            lowest = torch.finfo(torch.float32).min
            mask = shown if step % 2 else torch.where(shown, 0.0, lowest)
            a = llama(input_ids=part, **with_cache(llama, plain)).logits
            b = llama(input_ids=part, attention_mask=mask, **with_cache(llama, masked)).logits
            assert masked.conversation.view is None
            assert torch.equal(a, b) if new < 150 else torch.allclose(a, b, atol=1e-4)
            if new == 150:
                masked = handle.new_cache()
                llama(input_ids=part, **with_cache(llama, masked))


@pytest.mark.parametrize("types", TYPES)
@torch.no_grad()
def test_a_batch_continues_a_shared_prefix_with_pads_in_the_middle(llama: Any, types: str) -> None:
    """Still dense: prefix and turns are planned as one prompt, and the pads stay hidden."""
    prefix = token_ids(1, 40).expand(2, -1)
    turns, own = left_padded([130, 101], seed=3)
    mask = torch.cat([torch.ones_like(prefix), own], dim=1)
    step = token_ids(2, 3, seed=8)
    longer = torch.cat([mask, torch.ones_like(step)], dim=1)

    def run(cache: Any) -> list[Tensor]:
        llama(input_ids=prefix, **with_cache(llama, cache))
        whole = {"input_ids": torch.cat([prefix, turns], dim=1), "attention_mask": mask}
        out = llama.generate(
            **whole, **with_cache(llama, cache), max_new_tokens=1, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        where = {"position_ids": positions_of(longer, 3)}
        inputs = {"input_ids": step, "attention_mask": longer, **where}
        return [out.logits[0], llama(**inputs, **with_cache(llama, cache)).logits]

    expected = run(DynamicCache(config=llama.config))
    with apply(llama, profile_of(llama, types), budget=0.97) as handle:
        cache = handle.new_cache()
        got = run(cache)
        assert cache.receipt().compressed_layers == 3
        assert cache.covered[0].ragged.rows[1].base == 170
        assert not cache.conversation.hides or cache.conversation.view is not None
    assert torch.equal(got[0], expected[0])
    if types == "dynamic":  # sees everything in a pass of several tokens
        assert (got[1] - expected[1]).abs().max() <= 1e-4 * expected[1].abs().max()


@torch.no_grad()
def test_at_budget_one_any_mask_is_the_models_own_affair(llama: Any) -> None:
    ids, step = token_ids(2, 90), token_ids(2, 1, seed=4)
    masks = [torch.randn(2, 4, 90, 90), torch.randn(2, 4, 1, 91)]
    right = torch.ones(2, 90, dtype=torch.long)
    right[1, 70:] = 0
    outs = []
    with apply(llama, profile_of(llama, "mixed"), budget=1.0) as handle:
        for cache in (handle.new_cache(), handle.new_cache()):
            outs.append(llama(input_ids=ids, attention_mask=masks[0], **with_cache(llama, cache)))
            outs.append(llama(input_ids=step, attention_mask=masks[1], **with_cache(llama, cache)))
            cache.reset()
            outs.append(llama(input_ids=ids, attention_mask=right, **with_cache(llama, cache)))
    dense = []
    for cache in (DynamicCache(config=llama.config), DynamicCache(config=llama.config)):
        dense.append(llama(input_ids=ids, attention_mask=masks[0], **with_cache(llama, cache)))
        dense.append(llama(input_ids=step, attention_mask=masks[1], **with_cache(llama, cache)))
        dense.append(llama(input_ids=ids, attention_mask=right))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(outs, dense, strict=True))


# -- refusals -------------------------------------------------------------------------------------


@torch.no_grad()
def test_dropped_padding_cannot_be_shown_again(llama: Any) -> None:
    ids, mask = left_padded([150, 131])
    with apply(llama, profile_of(llama, "mixed"), budget=0.4) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, attention_mask=mask, **with_cache(llama, cache))
        shown = torch.ones(2, 151, dtype=torch.long)
        shown[1, :10] = 0
        message = "shows positions 10 to 18 of row 1, which it hid"
        with pytest.raises(ModelError, match=message):
            llama(input_ids=ids[:, :1], attention_mask=shown, **with_cache(llama, cache))


@torch.no_grad()
def test_prompts_with_holes_are_refused_by_row(llama: Any) -> None:
    ids = token_ids(3, 150)
    mask = torch.ones_like(ids)
    mask[1, 140:] = 0
    mask[2, 60:80] = 0
    mask[2, 100:110] = 0
    with apply(llama, profile_of(llama, "mixed"), budget=0.4):
        with pytest.raises(ModelError, match="positions 140 to 149 of row 1, positions 60 to 109"):
            llama(input_ids=ids, attention_mask=mask)
        blocks = torch.block_diag(*[torch.ones(n, n).tril() for n in (90, 60)]).bool()
        packed = blocks[None, None].expand(3, 1, 150, 150)
        with pytest.raises(ModelError, match=r"positions 0 to 89 of row 0.*a row of its own"):
            llama(input_ids=ids, attention_mask=packed)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 1, 1, 151).fill_(-0.5), "adds a bias"),
        (torch.ones(1, 4, 1, 151, dtype=torch.bool), "4 masks per row"),
        (torch.ones(1, 1, 1, 150, dtype=torch.bool), r"found \[1, 1, 1, 150\]"),
        (torch.ones(3, 1, 1, 151, dtype=torch.bool), r"found \[3, 1, 1, 151\]"),
    ],
)
@torch.no_grad()
def test_more_than_a_mask_is_refused(llama: Any, mask: Tensor, message: str) -> None:
    ids = token_ids(1, 150)
    with apply(llama, profile_of(llama, "mixed"), budget=0.4) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, cache))
        with pytest.raises(ModelError, match=message):
            llama(input_ids=ids[:, :1], attention_mask=mask, **with_cache(llama, cache))


@torch.no_grad()
def test_tokens_of_unknown_positions_cannot_be_masked(llama: Any) -> None:
    ids = token_ids(1, 150)
    with apply(llama, profile_of(llama, "static"), budget=0.4) as handle:
        cache = handle.new_cache()
        llama(input_ids=ids, **with_cache(llama, cache))
        cache.covered[1].ragged._places = [None, None]
        mask = torch.ones(1, 151, dtype=torch.long)
        mask[0, 9] = 0
        with pytest.raises(CompressionError, match="layer 1 holds tokens whose positions"):
            llama(input_ids=ids[:, :1], attention_mask=mask, **with_cache(llama, cache))


# -- reading --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(0, 9999),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.booleans(),
)
def test_a_view_is_read_as_by_brute_force(
    starts: list[int], new: int, more: int, seed: int, share: float, additive: bool
) -> None:
    seen, rows = 5 + more + new, len(starts)
    begin = torch.tensor(starts)[:, None, None]
    plain = torch.ones(rows, new, seen, dtype=torch.bool).tril(seen - new)
    plain &= torch.arange(seen) >= begin
    generator = torch.Generator().manual_seed(seed)
    visible = plain & (torch.rand(plain.shape, generator=generator) >= share)
    mask = visible[:, None]
    if additive:
        mask = torch.where(mask, 0.0, -torch.inf)
    view = read_view(mask, tuple(starts), new, seen)
    same = all(
        bool(visible[row, query, token]) == bool(plain[row, query, token])
        for row in range(rows)
        for query in range(new)
        for token in range(seen)
        if token < seen - new or query == new - 1
    )
    assert (view is None) == same
    if view is not None:
        assert torch.equal(view.visible, visible)
        assert torch.equal(view.hidden, ~visible[:, -1])
    block = own_block(mask, rows, new, seen, torch.device("cpu"))
    assert torch.equal(block, visible[:, :, seen - new :])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 8))
def test_starts_are_read_from_left_padding(starts: list[int], new: int) -> None:
    seen = 8
    mask = torch.arange(seen) >= torch.tensor(starts)[:, None]
    causal = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
    assert row_starts((causal & mask[:, None])[:, None], len(starts), new, seen) == tuple(starts)
    assert row_starts(None, len(starts), new, seen) == (0,) * len(starts)
