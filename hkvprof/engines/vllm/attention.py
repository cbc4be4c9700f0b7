"""vLLM's own attention backend, told of prompts that end: what stays is moved, tables are shifted.

Decoding in 16 bits needs no kernel of its own. Past its prompt a row's block table begins at its
first kept block, and its length is shorter by what was freed; positions stay those of the whole
sequence. Rows whose blocks hold fewer bits are attended to by `held.attend`: for them vLLM's kernel
is shown the last block alone, and what it makes of it is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hkvprof.engines.vllm.compaction import HeadRule, Pages, compact
from hkvprof.engines.vllm.held import HeldPrompt, attend
from hkvprof.engines.vllm.requests import ROWS
from hkvprof.engines.vllm.seams import (
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from hkvprof.engines.vllm.spec import PlannedHeadSpec
from hkvprof.engines.vllm.windows import Windows
from hkvprof.heads import EXACT_BITS


@dataclass(frozen=True)
class PromptChunk:
    """A row of the step whose prompt ends in it, or so near that its last rows are wanted later.

    Queries `first` to `last` of the step are those of the prompt, which has `tokens` tokens, up to
    token `seen`; the row's `dropped` blocks go once it is whole.
    """

    row: int
    first: int
    last: int
    seen: int
    tokens: int
    dropped: int


def prompt_chunks(
    spec: PlannedHeadSpec, starts: list[int], seen: list[int], prompts: list[int], drops: list[int]
) -> list[PromptChunk]:
    """Of rows with queries from `starts` on, `seen` tokens after the step, and these prompts, which
    free so many blocks."""
    found = []
    for row, (tokens, after, dropped) in enumerate(zip(prompts, seen, drops, strict=True)):
        first = starts[row]
        before = after - (starts[row + 1] - first)
        near = after > tokens - spec.plan.keep.window
        if dropped and before < min(after, tokens) and near:
            end = min(after, tokens)
            found.append(PromptChunk(row, first, first + end - before, end, tokens, dropped))
    return found


def shifted(metadata: Any, dropped: Tensor, size: int) -> Any:
    """The metadata of rows that read from their block number `dropped` on."""
    table = metadata.block_table_tensor
    index = torch.arange(table.shape[1], device=table.device)[None] + dropped[:, None]
    return metadata.replace(
        block_table_tensor=table.gather(1, index.clamp_(max=table.shape[1] - 1)).contiguous(),
        seq_lens=metadata.seq_lens - dropped.to(metadata.seq_lens.dtype) * size,
        rswa_prefix_lens=None,
        _num_computed_tokens_cache=None,
    )


@dataclass(frozen=True)
class HeldQueries:
    """Queries `first` to `last` of the step, which follow a prompt that is held in fewer bits: they
    stand at token `place` and after it, and `table` are the row's blocks."""

    first: int
    last: int
    place: int
    held: HeldPrompt
    table: Tensor


def held_queries(
    spec: PlannedHeadSpec, common: Any, prompts: list[int], drops: list[int]
) -> list[HeldQueries]:
    """Of rows that free so many blocks of prompts of so many tokens."""
    starts, seen = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
    page, found = spec.plan.pages[spec.group], []
    for row, (tokens, dropped) in enumerate(zip(prompts, drops, strict=True)):
        first = max(starts[row], starts[row + 1] - (seen[row] - tokens))
        if dropped and first < starts[row + 1]:
            held = HeldPrompt(page, spec.plan.keep, tokens, dropped)
            place = seen[row] - (starts[row + 1] - first)
            table = common.block_table_tensor[row]
            found.append(HeldQueries(first, starts[row + 1], place, held, table))
    return found


@dataclass(frozen=True)
class Rest:
    """Queries that follow a prompt which ends in the same step (it is computed again after
    preemption): they attend to what was kept."""

    queries: Tensor
    metadata: Any


def rest_of(metadata: Any, spec: PlannedHeadSpec, chunks: list[PromptChunk]) -> Any:
    """Common metadata and query numbers of what follows the prompts; None where nothing does."""
    starts, seen = metadata.query_start_loc_cpu.tolist(), metadata.seq_lens.tolist()
    after = [one for one in chunks if one.last < starts[one.row + 1] and one.seen == one.tokens]
    if not after:
        return None
    counts = [starts[one.row + 1] - one.last for one in after]
    queries = torch.cat([torch.arange(one.last, starts[one.row + 1]) for one in after])
    rows = torch.tensor([one.row for one in after])
    loc = torch.tensor([0, *counts], dtype=metadata.query_start_loc.dtype).cumsum(0)
    loc = loc.to(metadata.query_start_loc.dtype)
    own = metadata.replace(
        query_start_loc=loc, query_start_loc_cpu=loc, seq_lens=metadata.seq_lens[rows],
        num_reqs=len(after), num_actual_tokens=sum(counts), max_query_len=max(counts),
        max_seq_len=max(seen), block_table_tensor=metadata.block_table_tensor[rows].contiguous(),
        slot_mapping=metadata.slot_mapping[queries], rswa_prefix_lens=None,
        _num_computed_tokens_cache=None,
    )  # fmt: skip
    return queries, shifted(own, torch.tensor([one.dropped for one in after]), spec.block_size)


def _builder(base: Any) -> Any:
    class PlannedBuilder(base):
        """Builds metadata whose rows past their prompts read what was kept."""

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            """See the backend's own builder."""
            common, spec = common_attn_metadata, self.kv_cache_spec
            told = common.rswa_prefix_lens
            prompts = [] if told is None else told[: common.num_reqs].tolist()
            own = ROWS.get(id(self.vllm_config), {})
            drops = [spec.dropped(tokens, own.get(row)) for row, tokens in enumerate(prompts)]
            if not any(drops):
                whole = common.replace(rswa_prefix_lens=None)
                made = super().build(common_prefix_len, whole, fast_build)
                made.hkvprof_chunks, made.hkvprof_held, made.hkvprof_rest = [], [], None
                return made
            computed, freed = common.compute_num_computed_tokens(), torch.tensor(drops)
            is_exact, done = spec.plan.pages[spec.group].is_exact, computed >= torch.tensor(prompts)
            away = freed if is_exact else torch.where(freed > 0, computed // spec.block_size, 0)
            moved = shifted(common, torch.where(done, away, 0), spec.block_size)
            made = super().build(0, moved, fast_build)
            starts = common.query_start_loc_cpu.tolist()
            chunks = prompt_chunks(spec, starts, common.seq_lens.tolist(), prompts, drops)
            made.hkvprof_chunks, made.hkvprof_rest = chunks, None
            made.hkvprof_held = [] if is_exact else held_queries(spec, common, prompts, drops)
            rest = rest_of(common, spec, chunks) if is_exact else None
            if rest is not None:
                made.hkvprof_rest = Rest(rest[0], super().build(0, rest[1], fast_build))
            return made

    return PlannedBuilder


def _impl(base: Any) -> Any:
    class PlannedImpl(base):
        """Attends as the backend does; then prompts that ended give up what is not kept."""

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
        ) -> None:
            """See the backend's own; blocks that begin are cleared first.

            Rows of bytes that a block held before may read as NaN, and vLLM's kernel multiplies
            what lies behind a sequence by zero.
            """
            if any(bits < EXACT_BITS for bits in layer.plan.bits):
                size = kv_cache.shape[2]
                kv_cache[slot_mapping[slot_mapping % size == 0] // size] = 0
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

        def forward(
            self, layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor,
            attn_metadata: Any, output: Tensor, *args: Any, **rest: Any,
        ) -> Tensor:  # fmt: skip
            """See the backend's own implementation."""
            given = (layer, query, key, value, kv_cache, attn_metadata, output)
            made: Tensor = super().forward(*given, *args, **rest)
            for chunk in getattr(attn_metadata, "hkvprof_chunks", ()):
                end_chunk(layer, chunk, query, kv_cache, attn_metadata.block_table[chunk.row])
            for asked in getattr(attn_metadata, "hkvprof_held", ()):
                output[asked.first : asked.last] = attend_held(layer, asked, query, kv_cache)
            after = getattr(attn_metadata, "hkvprof_rest", None)
            if after is not None:
                own = torch.empty_like(output[after.queries])
                some = query[after.queries].contiguous()
                super().forward(layer, some, key, value, kv_cache, after.metadata, own)
                output[after.queries] = own
            return made

    return PlannedImpl


def attend_held(layer: Any, asked: HeldQueries, query: Tensor, kv_cache: Tensor) -> Tensor:
    """Attention of queries to a prompt in fewer bits and what came after it."""
    pages, held = Pages(kv_cache, layer.isa), asked.held
    rows = query[asked.first : asked.last]
    blocks = asked.table[held.dropped : -(-(asked.place + len(rows)) // pages.size)].long()
    made = attend(held, pages.read, blocks, rows, asked.place, layer.hkvprof_rule.scaling)
    return made.to(query.dtype)


def end_chunk(
    layer: Any, chunk: PromptChunk, query: Tensor, kv_cache: Tensor, table: Tensor
) -> None:
    """Compact a head's prompt that ended, or keep the last rows of one that is about to end."""
    rule: HeadRule = layer.hkvprof_rule
    windows: Windows = layer.hkvprof_windows
    pages, window = Pages(kv_cache, layer.isa), rule.keep.window
    blocks = table[: -(-chunk.seen // pages.size)].long()
    rows = query[chunk.first : chunk.last]
    before = chunk.seen - len(rows)
    if len(rows) < window and before:
        last = int(table[(before - 1) // pages.size])
        rows = windows.join(last, rows, pages.read(blocks)[0][: chunk.seen], window)
    if chunk.seen == chunk.tokens:
        kept = compact(rule, pages, blocks, rows[-window:], chunk.tokens, chunk.dropped)
        for told in layer.hkvprof_watchers:
            told(layer.layer_name, chunk, kept)
        return
    own = pages.read(blocks)[0][: chunk.seen]
    rows = rows[-window:]
    windows.keep(int(blocks[-1]), chunk.seen, rows, own[len(own) - len(rows) :])


@cache
def planned_backend(base: Any) -> Any:
    """vLLM's backend `base` with planned blocks."""
    builder, impl = _builder(base.get_builder_cls()), _impl(base.get_impl_cls())
    return subclass_attention_backend_with_overrides(
        "Planned",
        base,
        {
            "get_builder_cls": staticmethod(lambda: builder),
            "get_impl_cls": staticmethod(lambda: impl),
        },
    )
