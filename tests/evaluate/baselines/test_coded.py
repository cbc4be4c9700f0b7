"""Methods that keep tokens in few bits: bytes by the format's arithmetic, values by brute force,
and what their papers say of them."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hkvprof
from hkvprof.errors import BudgetError, UsageError
from hkvprof.evaluate.baselines import PromptView, compress, find, kvtc, rdkv
from hkvprof.evaluate.baselines.base import Kept, Selection
from hkvprof.evaluate.baselines.codes import encode_groups, group_bytes
from hkvprof.evaluate.baselines.session import decide
from hkvprof.evaluate.prefill import capture
from hkvprof.models.calls import with_cache
from hkvprof.testbed.generator import make_sample
from tests.evaluate.baselines.synthetic import prompt_of, random_prompt

torch.set_num_threads(1)


def rows_of(selection: Selection) -> list[Kept]:
    kept = [choice for layer in selection for choice in layer]
    assert all(isinstance(choice, Kept) for choice in kept)
    return [choice for choice in kept if isinstance(choice, Kept)]


def by_hand(numbers: list[float], bits: int, group: int) -> list[float]:
    """The quantiser, a number at a time, with constants as float16 holds them."""
    made = []
    for number, x in enumerate(numbers):
        first = number // group * group
        own = numbers[first : first + group]
        least = float(torch.tensor(min(own)).half())
        step = float(torch.tensor(max((max(own) - least) / (2**bits - 1), 2.0**-14)).half())
        code = min(2**bits - 1, max(0, round((x - least) / step)))
        made.append(least + code * step)
    return made


# -- codes ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    width=st.integers(1, 70),
    bits=st.sampled_from((2, 4, 8)),
    group=st.sampled_from((1, 5, 32)),
)
def test_codes_are_the_quantiser_and_their_bytes_the_format(
    seed: int, rows: int, width: int, bits: int, group: int
) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    codes = encode_groups(x, bits, group)
    wanted = torch.tensor([by_hand(row.tolist(), bits, group) for row in x])
    torch.testing.assert_close(codes.decode(), wanted, rtol=1e-4, atol=1e-4)
    groups = math.ceil(width / group)
    assert codes.nbytes == math.ceil(rows * width * bits / 8) + rows * groups * (2 + 2)
    assert codes.nbytes == group_bytes(rows, width, bits, group)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_err_by_half_a_step_and_keep_constants(bits: int) -> None:
    x = torch.linspace(-3, 5, 257)[None]
    error = (encode_groups(x, bits, 257).decode() - x).abs().max()
    assert float(error) <= 8 / (2**bits - 1) / 2 * 1.01 + 5e-3
    flat = torch.full((2, 9), 1.5)
    assert torch.equal(encode_groups(flat, bits, 4).decode(), flat)
    assert torch.equal(encode_groups(torch.zeros(1, 3), bits, 2).decode(), torch.zeros(1, 3))


# -- KIVI -----------------------------------------------------------------------------------------


def test_kivi_in_two_bits_by_arithmetic() -> None:
    """70 tokens of width 8: 64 keys and 38 values are coded, the others stay (float32 here)."""
    prompt = random_prompt(1, tokens=70, share=0.9, layers=1, dim=8)
    row = rows_of(decide(find("kivi_int2"), prompt).selection)[0]
    keys = 64 * 8 * 2 // 8 + 8 * 2 * 4 + 6 * 8 * 4
    values = 38 * 8 * 2 // 8 + 38 * 1 * 4 + 32 * 8 * 4
    assert row.stored == keys + values
    source = prompt.layers[0]
    assert torch.equal(row.key[64:], source.key[0, 64:])
    assert torch.equal(row.value[38:], source.value[0, 38:])
    channel = by_hand(source.key[0, :64, 3].tolist(), 2, 32)
    assert row.key[:64, 3].tolist() == pytest.approx(channel, abs=1e-4)
    token = by_hand(source.value[0, 5].tolist(), 2, 32)
    assert row.value[5].tolist() == pytest.approx(token, abs=1e-4)


def test_kivi_takes_its_published_bits_on_long_prompts() -> None:
    """2 bits and two 16-bit constants per 32 numbers: 3 bits of 16 (arXiv 2402.02750)."""
    prompt = random_prompt(0, tokens=4096, share=0.9, layers=1, kv_heads=1, group=1, dim=64)
    prompt.counted_itemsize = 2
    row = rows_of(decide(find("kivi_int2"), prompt).selection)[0]
    assert row.stored is not None
    assert row.stored / (4096 * prompt.token_bytes) == pytest.approx(3 / 16, rel=0.03)


def test_keys_with_outlier_channels_are_better_coded_by_channel() -> None:
    """KIVI's observation: some channels of keys are large in all tokens, none of values'."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 256, 64, generator=generator)
    x[..., ::16] *= 30
    prompt = prompt_of(x, x.clone(), x.clone(), share=0.9)
    row = rows_of(decide(find("kivi_int2"), prompt).selection)[0]
    small = torch.ones(64, dtype=torch.bool)
    small[::16] = False

    def lost(made: Tensor) -> float:
        return float((made[:224] - x[0, 0, :224])[:, small].square().mean())

    assert lost(row.key) < lost(row.value) / 5


@pytest.mark.parametrize(("name", "share"), [("kivi_int8", 0.3), ("kivi_int2", 0.05)])
def test_kivi_says_what_it_needs(name: str, share: float) -> None:
    prompt = random_prompt(0, tokens=200, share=share, dim=32)
    prompt.counted_itemsize = 2
    with pytest.raises(BudgetError, match=r"all 200 tokens in \d bits take 0\.\d+ of the dense"):
        decide(find(name), prompt)


# -- SnapKV in 4 bits -----------------------------------------------------------------------------


def test_snapkv_in_four_bits_keeps_more_tokens_in_the_same_room() -> None:
    prompt = random_prompt(2, tokens=400, share=0.2, dim=32)
    prompt.counted_itemsize = 2
    plain = rows_of(decide(find("snapkv"), prompt).selection)
    coded = rows_of(decide(find("snapkv_int4"), prompt).selection)
    room = prompt.share * prompt.tokens * prompt.token_bytes
    for few, many in zip(plain, coded, strict=True):
        assert many.stored is not None
        assert 0.98 * room < many.stored <= room
        old = len(many.key) - 16
        formula = math.ceil(32 * old * 4 / 8) + 32 * math.ceil(old / 32) * 4
        formula += math.ceil(old * 32 * 4 / 8) + old * 4 + 16 * prompt.token_bytes
        assert many.stored == formula
        assert len(many.key) > 2 * len(few.key)
        assert torch.equal(many.key[-16:], few.key[-16:])


# -- RDKV -----------------------------------------------------------------------------------------


def test_rdkv_is_exact_where_all_fits_and_evicts_where_nothing_does() -> None:
    """Full precision and eviction are the two ends of one allocation (its abstract)."""
    prices = rdkv.BitPrices((0, 2, 4, 8, 16), (1, 0.3, 0.02, 1e-4, 0), (0, 20, 36, 68, 128))
    weight = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.01
    assert prices.allocate(weight, 50 * 128).tolist() == [16] * 50
    assert prices.allocate(weight, 0).tolist() == [0] * 50
    middle = prices.allocate(weight, 50 * 30)
    order = weight.argsort(descending=True)
    assert middle[order].tolist() == sorted(middle.tolist(), reverse=True)  # heavier, more bits
    assert len(set(middle.tolist())) > 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), room=st.integers(0, 400))
def test_rdkv_allocates_as_brute_force_does_at_its_own_bytes(seed: int, room: int) -> None:
    """No other allocation of at most the bytes that it took loses less (Lagrange)."""
    bits, loss, size = (0, 2, 4, 8), (1.0, 0.3, 0.02, 1e-4), (0.0, 20.0, 36.0, 68.0)
    weight = torch.rand(5, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3
    prices = rdkv.BitPrices(bits, loss, size)
    found = [bits.index(b) for b in prices.allocate(weight, room).tolist()]
    taken = sum(size[i] for i in found)
    assert taken <= room

    def lost(choice: Any) -> float:
        return sum(float(w) * loss[i] for w, i in zip(weight, choice, strict=True))

    others = (c for c in product(range(4), repeat=5) if sum(size[i] for i in c) <= taken)
    assert lost(found) <= min(map(lost, others)) + 1e-9


def test_rdkv_stores_what_it_says_and_more_bits_come_closer() -> None:
    errors = []
    for share in (0.05, 0.2, 0.6):
        prompt = random_prompt(3, tokens=300, share=share, layers=1, kv_heads=1, group=1, dim=32)
        prompt.counted_itemsize = 2
        (row,) = rows_of(decide(find("rdkv"), prompt).selection)
        room = share * prompt.tokens * prompt.token_bytes
        assert row.stored is not None
        assert 0.85 * room < row.stored <= room
        assert len(row.key) == len(row.value) <= prompt.tokens
        layer = prompt.layers[0]
        attention = (layer.query[0, -1] @ row.key.T).softmax(-1) @ row.value
        dense = (layer.query[0, -1] @ layer.key[0].T).softmax(-1) @ layer.value[0]
        errors.append(float((attention - dense).norm() / dense.norm()))
    assert errors[2] < 0.1 < errors[0]
    assert errors[2] < errors[1]


# -- KVTC -----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(0, 800))
def test_kvtc_plans_as_brute_force_does(seed: int, bits: int) -> None:
    """Three steps of components, and every choice of bits for each."""
    spread = torch.tensor([8.0, 2.0, 0.5]).repeat_interleave(kvtc.STEP)
    generator = torch.Generator().manual_seed(seed)
    judged = torch.randn(20, 3 * kvtc.STEP, generator=generator) * spread

    def cost(width: int) -> int:
        return (kvtc.STEP * width + kvtc.OVERHEAD * bool(width)) // kvtc.OVERHEAD

    def lost(plan: list[Any]) -> float:
        kept = {first: width for first, _, width in plan}
        total = 0.0
        for first in range(0, 3 * kvtc.STEP, kvtc.STEP):
            part = judged[:, first : first + kvtc.STEP]
            if first in kept:
                part = part - encode_groups(part, kept[first], kvtc.STEP).decode()
            total += float(part.square().sum())
        return total

    plan = kvtc.allocate(judged, bits)
    budget = bits // kvtc.OVERHEAD
    assert sum(cost(width) for _, _, width in plan) <= budget
    choices = [c for c in product(kvtc.BITS, repeat=3) if sum(map(cost, c)) <= budget]
    best = min(
        lost([(i * kvtc.STEP, (i + 1) * kvtc.STEP, w) for i, w in enumerate(c) if w])
        for c in choices
    )
    assert lost(plan) == pytest.approx(best, rel=1e-5)


def test_kvtc_compresses_what_repeats_and_keeps_its_ends() -> None:
    """Caches of low rank over layers and heads take a twentieth and lose little (its abstract)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 6, generator=generator)
    weights = torch.randn(2, 12 * 4, 6, 32, generator=generator)
    key, value = (torch.einsum("tr,hrd->htd", hidden, w).view(12, 4, 600, 32) for w in weights)
    prompt = prompt_of(torch.randn(12, 4, 600, 32, generator=generator), key, value, share=0.05)
    prompt.counted_itemsize, prompt.calibration = 2, lambda: [prompt.prefill]
    rows = rows_of(decide(find("kvtc"), prompt).selection)
    room = prompt.share * prompt.tokens * prompt.token_bytes
    recent = prompt.room // 2
    for row, layer, head in ((rows[n], prompt.layers[n // 4], n % 4) for n in range(48)):
        assert row.stored is not None
        assert row.stored <= room + 1
        assert torch.equal(row.key[:4], layer.key[head, :4])
        assert torch.equal(row.value[-recent:], layer.value[head, -recent:])
        for made, source in ((row.key, layer.key[head]), (row.value, layer.value[head])):
            assert float((made - source).norm() / source.norm()) < 0.1
    prompt.calibration, prompt.model = None, torch.nn.Identity()
    with pytest.raises(UsageError, match="fits its components on calibration prompts"):
        decide(find("kvtc"), prompt)


# -- on a model -----------------------------------------------------------------------------------


@torch.no_grad()
def test_in_eight_bits_a_model_says_what_it_says() -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
    messages = make_sample("list", 1, images=8, split="calibration").messages
    prompt = capture(model, processor.encode([messages]))
    token = prompt.logits.argmax(-1, keepdim=True)
    full = prompt.dense_cache()
    wanted = model(input_ids=token, **with_cache(model, full)).logits[0, -1].log_softmax(-1)
    found = []
    for name in ("kivi_int8", "kivi_int4", "kivi_int2"):
        with compress(model, prompt, name, 0.9) as cache:
            said = model(input_ids=token, **with_cache(model, cache)).logits[0, -1]
        found.append(float((wanted.exp() * (wanted - said.log_softmax(-1))).sum()))
    assert found[0] < 1e-3
    assert found[0] < found[1] < found[2]
    with pytest.raises(BudgetError):
        decide(find("kivi_int8"), PromptView(model, prompt, 0.2))
