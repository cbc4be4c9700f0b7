"""Prompts in fewer bits lie in slots as they were quantised; attention, against a dense one."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hkvprof.engines.vllm.held import AT_ONCE, HeldPrompt, attend
from hkvprof.heads import KeepRule
from hkvprof.profile.pages import PageFormat
from hkvprof.selection.residents import Residents

KEEP, SIZE = KeepRule(), 16


@dataclass
class Memory:
    """Pages without vLLM, in any order; remembers how many were read at a time."""

    key: Tensor
    value: Tensor
    most: int = field(default=0)

    @classmethod
    def of(cls, blocks: int, dim: int, dtype: torch.dtype) -> Memory:
        """Pages that nobody wrote are full of NaN."""
        shape = (blocks, SIZE, dim)
        return cls(
            torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        )

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See held.ReadPages."""
        self.most = max(self.most, len(blocks))
        return self.key[blocks].flatten(0, 1), self.value[blocks].flatten(0, 1)

    def write(self, blocks: Tensor, first: int, key: Tensor, value: Tensor) -> None:
        """Into slots from number `first` of these blocks on."""
        places = torch.arange(first, first + len(key))
        slots = blocks[places // SIZE], places % SIZE
        self.key[slots], self.value[slots] = key, value


@dataclass
class Case:
    """A prompt that was compacted, and tokens that followed it."""

    held: HeldPrompt
    memory: Memory
    blocks: Tensor
    chosen: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def draw(cls, bits: int, tokens: int, dropped: int, more: int, dtype: torch.dtype) -> Case:
        """Random ones of 32 channels, one of them far out."""
        generator = torch.Generator().manual_seed(tokens)
        held = HeldPrompt(PageFormat(bits, SIZE, 32, dtype.itemsize), KEEP, tokens, dropped)
        key, value = torch.randn(2, tokens + more, 32, generator=generator)
        key[:, 3] += 20
        key, value = key.to(dtype), value.to(dtype)
        middle = torch.randperm(tokens - 12, generator=generator)[: held.rows].sort().values + 4
        chosen = torch.cat([torch.arange(4), middle, torch.arange(tokens - 8, tokens)])
        count = -(-(tokens + more) // SIZE) - dropped
        blocks, memory = torch.randperm(count, generator=generator), Memory.of(count, 32, dtype)
        data, *exact = held.pack(key[:tokens], value[:tokens], chosen)
        memory.write(blocks, 0, *data.view(dtype).chunk(2, 1))
        memory.write(blocks, len(data), *exact)
        memory.write(blocks, held.slots, key[tokens:], value[tokens:])
        return cls(held, memory, blocks, chosen, key, value)

    def kept(self) -> tuple[Tensor, Tensor]:
        """What the transformers runtime attends to (runtime.packing)."""
        prompt = self.key[: self.held.tokens], self.value[: self.held.tokens]
        middle, few = slice(4, self.held.tokens - 8), self.chosen[4:-8]
        own = Residents.around(prompt[0][middle], prompt[1][middle], self.held.pages.bits)
        rows = own.append(prompt[0][few], prompt[1][few]).decode()
        ends = torch.cat([self.chosen[:4], self.chosen[-8:]])
        parts = zip(rows, prompt, strict=True)
        made = [torch.cat([p[ends][:4], row, p[ends][4:]]) for row, p in parts]
        return made[0], made[1]


CASES = st.tuples(
    st.sampled_from([4, 8]), st.integers(60, 700), st.floats(0, 1), st.integers(1, 150),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip


def drawn(given: tuple[int, int, float, int, torch.dtype]) -> Case:
    """Any number of blocks is freed that leaves room for one row."""
    bits, tokens, part, more, dtype = given
    most = (tokens - PageFormat(bits, SIZE, 32, dtype.itemsize).least_slots(KEEP)) // SIZE
    return Case.draw(bits, tokens, max(1, round(part * most)), more, dtype)


@settings(deadline=None, max_examples=40)
@given(given=CASES)
def test_what_is_read_back_is_what_was_quantised_to_the_bit(
    given: tuple[int, int, float, int, torch.dtype],
) -> None:
    case = drawn(given)
    assert len(case.chosen) == case.held.kept
    found = case.held.restore(case.memory.read, case.blocks)
    for mine, theirs in zip(found, case.kept(), strict=True):
        assert torch.equal(mine, theirs)


@settings(deadline=None, max_examples=40)
@given(given=CASES, queries=st.integers(1, 40))
def test_attention_is_that_of_a_dense_softmax(
    given: tuple[int, int, float, int, torch.dtype], queries: int
) -> None:
    case = drawn(given)
    count = min(queries, given[3])
    query = torch.randn(count, 3, 32, generator=torch.Generator().manual_seed(1)).to(given[4])
    first = len(case.key) - count
    case.memory.most = 0
    found = attend(case.held, case.memory.read, case.blocks, query, first, 0.2)
    assert case.memory.most <= AT_ONCE
    kept, since = case.kept(), case.held.tokens
    keys, values = (
        torch.cat([part, own[since:]]).float()
        for part, own in zip(kept, (case.key, case.value), strict=True)
    )
    unseen = torch.ones(count, len(keys), dtype=torch.bool).triu(len(keys) - count + 1)
    logits = (query.float().transpose(0, 1) @ keys.T * 0.2).masked_fill(unseen, -torch.inf)
    wanted = (logits.softmax(dim=-1) @ values).transpose(0, 1)
    # Values that are read back are rounded to the model's dtype; attention is not.
    close = 1e-4 if given[4] is torch.float32 else 4e-2
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("bits", [4, 8])
def test_attention_to_any_context_takes_the_same_memory(bits: int) -> None:
    case = Case.draw(bits, 6000, 100, 10, torch.float32)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                largest = max(largest, made.numel() * made.element_size())
            return made

    with Watch():
        attend(case.held, case.memory.read, case.blocks, torch.randn(1, 3, 32), 6009, 0.2)
    rows = AT_ONCE * case.held.pages.rows_in(SIZE)
    assert largest <= rows * 32 * 4 < case.held.rows * 32
