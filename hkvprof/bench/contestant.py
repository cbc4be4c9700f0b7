"""One method at work: its cache gets a prompt, read or filled in; then steps are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from hkvprof.bench.filled import Keys, RecordedSteps, dense_cache
from hkvprof.bench.machine import Lap, Machine, machine_for, stock_bytes
from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.records import Row
from hkvprof.errors import CompressionError
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.attention import AttentionCall
from hkvprof.models.calls import last_row_only, with_cache
from hkvprof.profile.budgets import Budget
from hkvprof.runtime import apply, measure_storage
from hkvprof.runtime.graph import GraphDecoder
from hkvprof.runtime.options import PREFETCH
from hkvprof.runtime.storage import HostChunks

if TYPE_CHECKING:
    from hkvprof.bench.prompts import Prompt

TOLERANCE = 0.05
"""By how much of itself a budget may be exceeded."""
_REPLAYS = 12
HostItems = dict[tuple[int, int], HostChunks]
"""By layer and segment, shared by a set of methods: budgets differ in what is hot, not in what is
on the host."""


@dataclass(frozen=True)
class BenchModel:
    """The model that all methods run on, its layout, and the machine that it is on."""

    model: Any
    view: ModelView
    machine: Machine

    @classmethod
    def of(cls, model: Any) -> BenchModel:
        """A model as it is."""
        return cls(model, view_model(model), machine_for(model.device))

    def dense_bytes(self, tokens: int, rows: int) -> int:
        """Bytes of a dense cache of so many tokens in each of so many rows."""
        return rows * tokens * self.view.grid.token_bytes(self.model.dtype.itemsize)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a cache on the device by account and by its tensors, on the host, and dense."""

    resident: int
    storage: int
    host: int
    dense: int


class Contestant:
    """A method with a cache of its own. Several may be at work on one model, turn by turn.

    The model is hooked only while a compressing method runs: dense ones see the plain model.
    `tokens` is the prompt's length; `forced` are the tokens of all steps, the same for everyone.
    """

    def __init__(
        self,
        subject: BenchModel,
        method: Method,
        tokens: int,
        forced: Sequence[Int[Tensor, "rows 1"]],
    ) -> None:
        self.model, self.view, self.machine = subject.model, subject.view, subject.machine
        self.subject, self.method, self.tokens, self.forced = subject, method, tokens, forced
        self.cache: Any = None
        self.steps = 0
        self.blocks: list[list[Lap]] = []
        self._recorded: Callable[[Tensor], Any] | None = None
        self._row_only = last_row_only(self.model)

    @contextmanager
    def hooked(self) -> Iterator[Any]:
        """The model as this method sees it; a cache works under any handle of its model."""
        method = self.method
        if method.profile is None:
            yield None
            return
        prefetch = PREFETCH if method.prefetch else None
        with apply(
            self.model, method.profile, budget=method.budget, min_tokens=1, prefetch=prefetch,
            fetch=method.fetch,
        ) as handle:  # fmt: skip
            yield handle

    @torch.no_grad()
    def decode(self, steps: int, timed: bool = True) -> None:
        """Continue with the next `steps` forced tokens; timed ones make a block."""
        ids = self.forced[self.steps : self.steps + steps]
        assert len(ids) == steps
        step = self._recorded or self._forward_ids  # not kept: a cycle would keep the cache alive
        with self.hooked():
            laps = [self.machine.lap(partial(step, one)) for one in ids]
        self.machine.wait()
        self.steps += steps
        if timed:
            self.blocks.append(laps)

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of every step but the first of each block, which warms up."""
        return [lap() for block in self.blocks for lap in block[1:]]

    def receipt(self) -> Any:
        """The runtime's account now, None for caches of transformers."""
        return self.cache.receipt() if self.method.kind.compresses else None

    def sizes(self) -> Sizes:
        """Bytes now, of the layers that a profile covers."""
        if self.method.kind.compresses:
            account, (storage, _) = self.cache.receipt(), measure_storage(self.cache)
            return Sizes(account.resident_bytes, storage, account.host_bytes, account.dense_bytes)
        rows, seen = len(self.forced[0]), self.tokens + self.steps
        capacity = self.capacity if self.method.kind is Kind.PREALLOCATED else seen
        return Sizes(
            resident=self.subject.dense_bytes(capacity, rows),
            storage=stock_bytes(self.cache, self.view),
            host=0,
            dense=self.subject.dense_bytes(seen, rows),
        )

    @property
    def capacity(self) -> int:
        """Tokens of the prompt and of all steps."""
        return self.tokens + len(self.forced)

    def row_after_prompt(self, held: int | None) -> Row:
        """Bytes after the prompt; `held` ones are those that the machine counts."""
        sizes, receipt = self.sizes(), self.receipt()
        row = replace(
            self.method.row(),
            resident_bytes=sizes.resident,
            dense_share=sizes.resident / sizes.dense,
            storage_bytes=sizes.storage,
            held_bytes=held,
            host_bytes=sizes.host,
        )
        return row if receipt is None else replace(row, table_bytes=receipt.shared_bytes)

    def row_after_steps(self, row: Row) -> Row:
        """The row with figures of all steps."""
        taken, receipt = self.step_ms, self.receipt()
        row = replace(
            row,
            steps=len(taken),
            step_ms=median(taken),
            step_ms_p90=quantiles(taken, n=10, method="inclusive")[-1],
        )
        if receipt is None or receipt.hit_rate is None:
            return row
        return replace(
            row,
            hit_rate=receipt.hit_rate,
            moved_bytes=receipt.bytes_moved / self.steps,
            read_share=receipt.read_share,
            limit_share=receipt.limit_share,
        )

    def _forward_ids(self, ids: Tensor) -> Any:
        return self._forward({"input_ids": ids})

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> Any:
        """One pass of the model as it is."""
        cache = with_cache(self.model, self.cache)
        return self.model(**inputs, **cache, use_cache=True, **self._row_only)


class PromptContestant(Contestant):
    """A method that reads a prompt."""

    def __init__(self, subject: BenchModel, method: Method, prompt: Prompt) -> None:
        super().__init__(subject, method, prompt.tokens, prompt.forced.split(1, dim=1))
        self.prompt = prompt
        self.prefill_seconds = 0.0

    def prefill(self) -> None:
        """Read the prompt into a new cache."""
        with self.hooked() as handle:
            self.cache = self._new_cache(handle)
            self.machine.wait()
            lap = self.machine.lap(lambda: self._forward(self.prompt.inputs))
        self.prefill_seconds = lap() / 1e3

    def _new_cache(self, handle: Any) -> Any:
        if handle is not None:
            return handle.new_cache(self.tokens)
        config = self.view.text_config
        if self.method.kind is Kind.PREALLOCATED:
            return StaticCache(config=config, max_cache_len=self.capacity)
        return DynamicCache(config=config)

    def row_after_prompt(self, held: int | None) -> Row:
        """With seconds. Raises CompressionError where the cache is not what the method claims."""
        row, receipt = super().row_after_prompt(held), self.receipt()
        if receipt is None:
            return replace(row, prefill_seconds=self.prefill_seconds)
        verify(self.method, self.tokens, self.sizes(), receipt)
        on_cpu = self.model.device.type == "cpu"  # elsewhere the runtime keeps no time
        return replace(
            row,
            peak_bytes=receipt.peak_bytes,
            prefill_seconds=self.prefill_seconds,
            compression_seconds=receipt.compression_seconds if on_cpu else None,
            compression_source="runtime" if on_cpu else "",
        )

    def row_after_steps(self, row: Row) -> Row:
        """With the share of retrieval, which the runtime tells on a CPU."""
        row, receipt = super().row_after_steps(row), self.receipt()
        if receipt is None or self.model.device.type != "cpu":
            return row
        decoding = sum(lap() for block in self.blocks for lap in block) / 1e3
        return replace(row, retrieval_share=receipt.retrieval_seconds / decoding)


class FilledContestant(Contestant):
    """A method whose cache is filled layer by layer, as if a prompt had passed.

    `held` is what filling it took on the device; None where nobody counts. Raises HkvError for a
    method that cannot run here.
    """

    def __init__(
        self,
        subject: BenchModel,
        method: Method,
        tokens: int,
        forced: Sequence[Int[Tensor, "rows 1"]],
        keys: Keys,
    ) -> None:
        super().__init__(subject, method, tokens, forced)
        self.keys = keys
        self.held: int | None = None
        if method.profile is not None:
            with self.hooked() as handle:
                self.cache = handle.new_cache(tokens)
            return
        room = len(forced) if method.kind is Kind.PREALLOCATED else None
        self.cache = dense_cache(self.view.text_config, self.view.grid.layers, room)

    def fill(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, hosts: HostItems
    ) -> None:
        """Layer `number`: keys and values [rows, kv_heads, tokens, dim], `query` of their end."""
        before = self.machine.allocated()
        if self.method.profile is not None:
            self._compress(number, query, key, value, hosts)
        elif self.method.kind is Kind.PREALLOCATED:
            self.cache.layers[number].fill(key, value)
        else:
            self.cache.layers[number].update(key.clone(), value.clone())
        after = self.machine.allocated()
        if before is not None and after is not None:
            self.held = (self.held or 0) + after - before

    def _compress(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, hosts: HostItems
    ) -> None:
        layer = self.cache.covered[number]
        layer.update(key, value)
        scaling = key.shape[-1] ** -0.5
        module = torch.nn.Identity()
        layer.attend(AttentionCall(module, query, key, value, None, scaling, lambda: (key, None)))
        for segment, head in layer.ragged.dynamic.items():
            # Pinned memory is dear, and every contestant has the same items of a head.
            head.host = hosts.setdefault((number, segment), head.host)
            head.host.shared = True
            if self.method.control and key.is_cuda:
                data, coder = head.host.data.to(key.device), head.host.coder
                head.host = HostChunks(data, coder, head.host.items, head.host.dtype, pinned=False)

    def prepare(self) -> None:
        """Ready for steps; on CUDA a graph is recorded at the first of them."""
        graph, dense = self.method.graph, self.method.profile is None
        if graph and not dense:
            recorder = self.machine.recorder(self.cache.advance)
            self._recorded = GraphDecoder(self.model, self.cache, len(self.forced), recorder)
            return
        rows = len(self.forced[0])
        self._recorded = RecordedSteps(
            self.model, self.cache, self.tokens, rows, self.machine.recorder() if graph else None
        )

    def row_after_prompt(self, held: int | None = None) -> Row:
        """Held bytes are without index tables, a property of the profile."""
        row = super().row_after_prompt(None)
        held = row.storage_bytes if self.held is None else self.held - (row.table_bytes or 0)
        dense = self.subject.dense_bytes(self.tokens, len(self.forced[0]))
        if self.method.control or held is None:
            return row
        return replace(row, held_bytes=held, held_share=held / dense)

    def row_after_steps(self, row: Row) -> Row:
        """With what attention reads and how long it takes, and corrections of prefetch."""
        return replace(
            super().row_after_steps(row),
            read_bytes=self.read_bytes,
            attend_ms=self._attend_ms(),
            corrected_share=self.corrected_share,
        )

    @property
    def read_bytes(self) -> int:
        """Keys and values that attention reads in the next step, all layers."""
        if self.method.profile is None:
            return stock_bytes(self.cache, self.view)
        layers = [layer.ragged for layer in self.cache.covered]
        few = sum(one.quantised.rows.nbytes for one in layers if one.quantised is not None)
        return few + sum(sum(one.storage.lengths) * one.storage.token_bytes for one in layers)

    @torch.no_grad()
    def _attend_ms(self) -> float:
        """Milliseconds of all layers' attention, recorded so that launching takes no time."""
        rows, layers = len(self.forced[0]), self.view.grid.layers
        attend = partial(self._attend, [self.keys.queries(n, rows, 1) for n in range(layers)])
        attend()
        replay = self.machine.recorder().record(attend)
        replay()
        return median(self.machine.lap(replay)() for _ in range(_REPLAYS))

    def _attend(self, queries: Sequence[Tensor]) -> Tensor:
        """Attention of all layers alone, given [rows, query_heads, 1, dim] for each."""
        outs = []
        for number, query in enumerate(queries):
            if self.method.profile is None:
                layer = self.cache.layers[number]
                outs.append(
                    F.scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)
                )
            else:
                outs.append(self.cache.covered[number].ragged.attend_resident(query))
        return outs[-1]

    @property
    def corrected_share(self) -> float | None:
        """Of selections with prefetch, those that had to precede attention."""
        counts = steps = 0
        for layer in self.cache.covered if self.method.profile is not None else ():
            retriever = layer.ragged.retriever
            if retriever.prefetch is not None:
                counts += int(retriever.prefetch.corrected.sum())
                steps += retriever.prefetch.steps * len(retriever.prefetch.corrected)
        return counts / steps if steps else None


def verify(method: Method, tokens: int, sizes: Sizes, receipt: Any) -> None:
    """Raise CompressionError unless the cache is compressed, within its budget and truly counted.

    Every claim is held against a second figure. `receipt` and `sizes` are those after a prompt of
    `tokens` tokens.
    """
    where = f"{method.name}, {tokens} tokens"
    if not receipt.compressed_layers or sizes.resident >= sizes.dense:
        reasons = "; ".join(sorted({layer.reason for layer in receipt.layers if layer.reason}))
        raise CompressionError(
            f"{where}: nothing was compressed ({reasons or 'no reason given'}); expected "
            f"{sizes.dense} bytes to become fewer, found {sizes.resident}: use a longer context"
        )
    if sizes.storage != sizes.resident:
        raise CompressionError(
            f"{where}: the receipt tells {sizes.resident} resident bytes, the cache's tensors hold "
            f"{sizes.storage}; expected the same: please report it with this command"
        )
    budget = Budget.parse(method.budget).resolve(tokens, sizes.dense)
    share = sizes.resident / sizes.dense
    if share > budget * (1 + TOLERANCE):
        raise CompressionError(
            f"{where}: expected at most {budget:.2%} of the dense bytes, found {share:.2%}: please "
            "report it with this command; a longer context or a larger budget may help"
        )
