"""Time of the CPU decode kernels against dense attention, one layer of a model at a time.

The regime is that of a real decode step: many layers take turns, so that nothing of a layer is in a
CPU cache when its turn comes; the dense baseline is measured between them. The baseline is the
faster of matmul and scaled_dot_product_attention over keys and values packed per KV head. Queries
drift: q_t = 0.9 q_(t-1) + sqrt(1 - 0.81) noise, over keys of falling spectrum, half of whose
variance neighbours share. Times are medians (`--quantile`).

    python -m tools.studies.decode_kernels [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import (
    DynamicSegment,
    Extents,
    Kernels,
    QuantisedRows,
    Retrieval,
)
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.selection.index import HeadTables, KeyIndex, MeanIndex, MinMaxIndex, ProjectedIndex
from hkvprof.selection.quantiser import CHANNELS, CODE_UNIT, fit_codebook, fit_projection
from hkvprof.selection.residents import Residents

QUERY_HEADS, KV_HEADS, DIM, TOKENS = 28, 4, 128, 32768
GROUP = QUERY_HEADS // KV_HEADS
DTYPE = torch.bfloat16
HOT_SHARE = 0.1
DRIFT = 0.9
NEIGHBOURS = 64
"""Tokens of a run, such as an image region or a sentence."""
SHARPNESS = 3.0
"""Standard deviation of the scaled logits."""


FEWER = (" int8", " int4")
"""Static heads whose tokens are all in fewer bits."""
PHASES = ("score", "load", "attend", "step", "step attend")
"""A step in two parts with its attention; and the whole step with its attention."""


@dataclass
class Times:
    """Seconds per call, by phase."""

    phases: dict[str, list[float]] = field(default_factory=dict)
    fetched: list[float] = field(default_factory=list)

    def add(self, name: str, seconds: float) -> None:
        self.phases.setdefault(name, []).append(seconds)

    def quantile(self, name: str, share: float) -> float:
        return float(np.quantile(self.phases.get(name, [0.0]), share))


class Keys:
    """Keys of falling spectrum in a random basis, and queries that drift in the same space.

    One KV head of every layer: spectrum and basis are the same for all, which saves fitting time.
    """

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        spectrum = torch.arange(1, DIM + 1).float().pow(-0.75)
        basis, _ = torch.linalg.qr(self.normal(DIM, DIM))
        self.root = spectrum[:, None] * basis * (DIM / spectrum.square().sum()).sqrt()
        self.fitted: dict[int, HeadTables] = {}
        logits = self.queries(1, 256)[0] @ self.normal(256, DIM).matmul(self.root).T
        self.sharpness = SHARPNESS * DIM**0.5 / logits.std()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def queries(self, *shape: int) -> Tensor:
        return self.normal(*shape, DIM) @ self.root

    def keys(self) -> Tensor:
        """[tokens, dim]; runs of NEIGHBOURS tokens share half of their variance."""
        shared = self.normal(TOKENS // NEIGHBOURS, DIM).repeat_interleave(NEIGHBOURS, dim=0)
        mixed = (shared + self.normal(TOKENS, DIM)) / 2**0.5
        return (mixed @ self.root).to(DTYPE)

    def tables(self, bits: int) -> HeadTables:
        """A copy of the fitted constants: every head of a model has its own."""
        if bits not in self.fitted:
            sample = self.normal(4096, DIM) @ self.root
            covariance = self.root.T @ self.root
            fit = fit_projection(covariance, covariance)
            used = min(CHANNELS[bits], DIM)
            codebook, owner = fit_codebook(sample @ fit.key_projection, fit.deviation, bits)
            order = owner.argsort(kind="stable")
            ends = [0, *np.bincount(owner, minlength=bits // 8).cumsum().tolist()]
            unit = fit.deviation[:used][order] * CODE_UNIT
            self.fitted[bits] = HeadTables(
                fit.query_projection[:, :used][:, order].contiguous(),
                fit.key_projection[:, :used][:, order].contiguous(),
                torch.zeros(DIM),
                torch.from_numpy(codebook).float()[:, order] * unit,
                tuple(pairwise(ends)),
            )
        fitted = self.fitted[bits]
        return replace(
            fitted,
            query_projection=fitted.query_projection.clone(),
            key_projection=fitted.key_projection.clone(),
            key_mean=fitted.key_mean.clone(),
            codebook=fitted.codebook.clone(),
        )


class Layer:
    """A layer in which every head keeps a tenth of its tokens on the device."""

    def __init__(self, source: Keys) -> None:
        self.source = source
        hot = int(HOT_SHARE * TOKENS)
        self.keys = [self.source.keys() for _ in range(KV_HEADS)]
        self.offsets = [hot * head for head in range(KV_HEADS)]
        self.extents = Extents.of(self.offsets, [hot] * KV_HEADS)
        self.key = torch.cat([key[:hot] for key in self.keys])
        self.value = self.source.normal(hot * KV_HEADS, DIM).to(DTYPE)
        self.rows = {name: self.quantised(int(name[-1])) for name in FEWER}
        self.hosts: dict[int, list[Tensor]] = {}

    def quantised(self, bits: int) -> QuantisedRows:
        """The same tokens in fewer bits."""
        halves = self.key.chunk(KV_HEADS), self.value.chunk(KV_HEADS)
        held = {
            head: Residents.around(key, value, bits).append(key, value)
            for head, (key, value) in enumerate(zip(*halves, strict=True))
        }
        rows = QuantisedRows.of(held)
        assert rows is not None
        return rows

    def queries(self) -> Queries:
        """A walk of this layer's queries."""
        return Queries(self.source)

    def bind(self, kernel: Kernels, kind: str) -> Retrieval:
        """Dynamic heads with this index, hot slots filled with their first items."""
        chunk = 1 if kind.startswith("projected") else 32
        items, hot = TOKENS // chunk, int(HOT_SHARE * TOKENS) // chunk
        if chunk not in self.hosts:
            self.hosts[chunk] = [
                torch.stack(
                    [key.view(items, chunk, DIM), torch.randn(items, chunk, DIM).to(DTYPE)], dim=1
                )
                for key in self.keys
            ]
        heads = []
        for head, key in enumerate(self.keys):
            chunks = key.view(items, chunk, DIM)
            index: KeyIndex
            if kind == "mean":
                index = MeanIndex.build(chunks)
            elif kind == "minmax":
                index = MinMaxIndex.build(chunks)
            else:
                index = ProjectedIndex.build(key, self.source.tables(int(kind.split()[1])))
            slots = torch.arange(hot, dtype=torch.int32)
            host = self.hosts[chunk][head]
            rerank = int(kind.split("rerank ")[1]) if "rerank" in kind else 0
            heads.append(
                DynamicSegment(
                    head, index, slots, host, self.offsets[head], chunk, items, rerank=rerank
                )
            )
        return kernel.bind(self.key, self.value, heads, DIM**-0.5)


class Queries:
    """q_t = DRIFT q_(t-1) + noise, scaled to a realistic sharpness."""

    def __init__(self, source: Keys) -> None:
        self.source = source
        self.state = source.queries(KV_HEADS, GROUP)

    def next(self) -> Tensor:
        """[kv_heads, group, dim]."""
        noise = self.source.queries(KV_HEADS, GROUP)
        self.state = DRIFT * self.state + (1 - DRIFT**2) ** 0.5 * noise
        return (self.state * self.source.sharpness).to(DTYPE)


def dense_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two batched products, softmax in float32."""
    weights = (query @ key.transpose(1, 2)).float().mul_(DIM**-0.5).softmax(dim=-1)
    return weights.to(value.dtype) @ value


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The group's query heads as rows of one head."""
    return F.scaled_dot_product_attention(query[None], key[None], value[None])[0]


def read_all(tensors: tuple[Tensor, ...]) -> None:
    """Read every byte once."""
    for tensor in tensors:
        tensor.sum()


def clock(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(
    layers: list[Layer], steps: int, kinds: list[str]
) -> tuple[dict[str, Times], list[float]]:
    """Times of every variant, taken in turn; and seconds per byte of plain reading."""
    fast, plain = kernels.for_device(torch.device("cpu"), DTYPE), TorchKernels()
    dense = [[torch.randn(KV_HEADS, TOKENS, DIM).to(DTYPE) for _ in range(2)] for _ in range(3)]
    static = {"torch static": plain} | {f"native static{bits}": fast for bits in ("", *FEWER)}
    none, empty = torch.empty(0, DIM, dtype=DTYPE), Extents.of([0] * KV_HEADS, [0] * KV_HEADS)
    bound = {
        f"{kernel.name} {kind}": (kernel, [layer.bind(kernel, kind) for layer in layers])
        for kernel in (plain, fast)
        for kind in kinds
    }
    walks = [layer.queries() for layer in layers]
    times: dict[str, Times] = {}
    reads: list[float] = []

    def take(name: str, phase: str, run: Callable[[], Any]) -> None:
        times.setdefault(name, Times()).add(phase, clock(run))

    def one(step: int, layer: Layer, number: int, variant: str, query: Tensor) -> None:
        place = (layer.key, layer.value, layer.extents)
        if variant in static:
            kernel, rows = static[variant], layer.rows.get(variant.removeprefix("native static"))
            if rows is not None:
                place = (none, none, empty)
            take(variant, "attend", lambda: kernel.attend(*place, query, DIM**-0.5, rows))
            return
        kernel, retrievals = bound[variant]
        retrieval = retrievals[number]
        if step % 2:  # the whole step as it is used, and the same in parts
            before = int(retrieval.fetched.sum())
            take(variant, "step", lambda: retrieval.step(query))
            take(variant, "step attend", lambda: kernel.attend(*place, query, DIM**-0.5))
            hot = sum(
                int(HOT_SHARE * TOKENS) // (1 if "proj" in variant else 32) for _ in layer.keys
            )
            times[variant].fetched.append((int(retrieval.fetched.sum()) - before) / hot)
        else:
            scores: list[Tensor] = []
            take(variant, "score", lambda: scores.extend(retrieval.score(query)))
            take(variant, "load", lambda: retrieval.load(scores))
            take(variant, "attend", lambda: kernel.attend(*place, query, DIM**-0.5))

    for step in range(steps + 2):
        if step == 2:
            times.clear()
            reads.clear()
        for number in range(len(layers)):
            pair = dense[number % len(dense)]
            query = walks[number].next()
            take("dense matmul", "attend", partial(dense_matmul, query, *pair))
            pair = dense[(number + 1) % len(dense)]
            take("dense sdpa", "attend", partial(dense_sdpa, query, *pair))
        for layer in layers:
            nbytes = layer.key.nbytes + layer.value.nbytes
            both = (layer.key.view(torch.int64), layer.value.view(torch.int64))
            reads.append(clock(partial(read_all, both)) / nbytes)
        queries = [walk.next() for walk in walks]
        for variant in (*static, *bound):
            for number, layer in enumerate(layers):
                one(step, layer, number, variant, queries[number])
    return times, reads


def table(times: dict[str, Times], bandwidth: float, share: float) -> list[dict[str, Any]]:
    """Rows to print: milliseconds, ratio to dense, share of the read bound."""
    dense = min(times[name].quantile("attend", share) for name in ("dense matmul", "dense sdpa"))
    kept = 2 * int(HOT_SHARE * TOKENS) * KV_HEADS * DIM * DTYPE.itemsize / bandwidth
    rows = []
    for name, found in times.items():
        ms = {name: 1e3 * found.quantile(name, share) for name in PHASES}
        whole = (ms["step"] + ms["step attend"] or ms["attend"]) / 1e3
        row = {"variant": name, "ms": 1e3 * whole, "ratio_to_dense": dense / whole}
        if "dense" not in name and not name.endswith(FEWER):
            row["share_of_read_bound"] = 1e3 * kept / ms["attend"]
        if found.fetched:
            row["fetched_share"] = statistics.mean(found.fetched)
            row |= {f"{name}_ms": ms[name] for name in PHASES}
            row["step_over_attend"] = ms["step"] / ms["attend"]
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kinds", nargs="*", default=None, help="such as 'projected 32 rerank 64'")
    parser.add_argument("--quantile", type=float, default=0.5, help="of the times; 0.5: median")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = options.kinds
    if kinds is None:
        reranked = [
            f"projected {bits} rerank {rerank}" for bits in (16, 32) for rerank in (64, 3276)
        ]
        kinds = ["projected 16", "projected 32", "projected 64", *reranked, "mean", "minmax"]
    with torch.inference_mode():
        source = Keys()
        layers = [Layer(source) for _ in range(options.layers)]
        times, reads = measure(layers, options.steps, kinds)
    bandwidth = 1 / float(np.quantile(reads, options.quantile))
    rows = table(times, bandwidth, options.quantile)
    regime = (
        f"one layer: {QUERY_HEADS} query heads, {KV_HEADS} KV heads, width {DIM}, {TOKENS} tokens, "
        f"{DTYPE}, {HOT_SHARE:.0%} kept; {options.layers} layers in turn, {options.threads} "
        f"threads, quantile {options.quantile}; {kernels.status()}; "
        f"reading {bandwidth / 1e9:.1f} GB/s"
    )
    out = sys.stdout.write
    out(regime + "\n")
    out(f"{'':30}{'ms':>8}{'x dense':>9}{'of bound':>10}{'fetched':>9}")
    out(f"{'score':>8}{'load':>8}{'attend':>8}{'step/attend':>13}\n")
    for row in rows:
        out(f"{row['variant']:30}{row['ms']:8.3f}{row['ratio_to_dense']:9.2f}")
        out(f"{row['share_of_read_bound']:10.0%}" if "share_of_read_bound" in row else " " * 10)
        if "fetched_share" in row:
            out(f"{row['fetched_share']:9.1%}{row['score_ms']:8.3f}{row['load_ms']:8.3f}")
            out(f"{row['attend_ms']:8.3f}{row['step_over_attend']:13.2f}")
        out("\n")
    if options.json:
        options.json.write_text(json.dumps({"regime": regime, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
