"""Indexes of dynamic heads: small device-side summaries of the tokens that live on the host.

One interface, three kinds, named in the profile: `mean` and `minmax` digests per chunk (HybridKV
section 3.3; Quest, arXiv 2406.10774) and `projected`, a query-aware projection of every key,
quantised to 16, 32 or 64 bits (docs/method.md). Calibration and runtime share this code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.heads import Strategy

STEP = (0.0, 1.596, 0.996, 0.586, 0.335, 0.188)
"""Step of the best uniform quantiser of a unit normal, by bits (Max, 1960)."""
DISTORTION = (1.0, 0.363, 0.119, 0.0374, 0.0115, 0.0035)
"""Mean squared error of that quantiser, by bits."""
MAX_CHANNELS = 40


class IndexArrays(Protocol):
    """The profile's arrays of projected-index constants (artifact.ProjectedIndexTables)."""

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def key_projection(self) -> np.ndarray[Any, Any]: ...
    @property
    def query_projection(self) -> np.ndarray[Any, Any]: ...
    @property
    def key_mean(self) -> np.ndarray[Any, Any]: ...
    @property
    def deviation(self) -> np.ndarray[Any, Any]: ...
    @property
    def bits(self) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class HeadTables:
    """Projected-index constants of one KV head on the device.

    `key_projection`, `query_projection` [dim, channels]; `key_mean` [dim]; `deviation` [channels];
    `bits` [channels], zeros for channels that are not stored.
    """

    key_projection: Float[Tensor, "dim channels"]
    query_projection: Float[Tensor, "dim channels"]
    key_mean: Float[Tensor, " dim"]
    deviation: Float[Tensor, " channels"]
    bits: tuple[int, ...]

    @classmethod
    def load(
        cls, arrays: IndexArrays, layer: int, head: int, bits: int, device: torch.device
    ) -> HeadTables:
        """One head's constants for an index of `bits` bits per token, as float32 on `device`.

        Channels without bits are left out.
        """
        widths = arrays.bits[arrays.sizes.index(bits), layer, head]
        used = np.flatnonzero(widths)

        def pick(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array[layer, head].astype(np.float32)).to(device)

        return cls(
            key_projection=pick(arrays.key_projection[..., used]),
            query_projection=pick(arrays.query_projection[..., used]),
            key_mean=pick(arrays.key_mean),
            deviation=pick(arrays.deviation[..., used]),
            bits=tuple(widths[used].tolist()),
        )

    @cached_property
    def used(self) -> list[int]:
        """Channels that have bits."""
        return [channel for channel, bits in enumerate(self.bits) if bits]

    @cached_property
    def shifts(self) -> list[int]:
        """Position of every used channel's code in the packed word."""
        widths = [self.bits[channel] for channel in self.used]
        return [sum(widths[:i]) for i in range(len(widths))]


class KeyIndex(ABC):
    """What the device knows about the host-side items of one dynamic head."""

    @abstractmethod
    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Estimated (unscaled) attention logits of every item, up to a constant per row."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The device tensors that this index holds per request."""

    def score(
        self, query: Float[Tensor, "*rows group dim"], scaling: float
    ) -> Float[Tensor, "*rows items"]:
        """Share of attention expected by every item: softmax per query head, mean over group."""
        return (self.logits(query.float()) * scaling).softmax(dim=-1).mean(dim=-2)


@dataclass(frozen=True)
class MeanIndex(KeyIndex):
    """The mean key of every chunk."""

    mean: Float[Tensor, "items dim"]

    @classmethod
    def build(cls, keys: Float[Tensor, "items chunk dim"]) -> MeanIndex:
        """Digest the chunked keys, in their own dtype."""
        return cls(keys.float().mean(dim=1).to(keys.dtype))

    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Dot product with the mean key."""
        return query @ self.mean.float().T

    def tensors(self) -> tuple[Tensor, ...]:
        """The means."""
        return (self.mean,)


@dataclass(frozen=True)
class MinMaxIndex(KeyIndex):
    """Smallest and largest key per channel of every chunk: an upper bound (Quest)."""

    low: Float[Tensor, "items dim"]
    high: Float[Tensor, "items dim"]

    @classmethod
    def build(cls, keys: Float[Tensor, "items chunk dim"]) -> MinMaxIndex:
        """Digest the chunked keys, in their own dtype."""
        return cls(keys.amin(dim=1), keys.amax(dim=1))

    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Sum over channels of max(q * low, q * high)."""
        return query.clamp(min=0) @ self.high.float().T + query.clamp(max=0) @ self.low.float().T

    def tensors(self) -> tuple[Tensor, ...]:
        """Both bounds."""
        return (self.low, self.high)


@dataclass(frozen=True)
class ProjectedIndex(KeyIndex):
    """One packed word per token: the projected, quantised key."""

    words: Int[Tensor, " items"]
    tables: HeadTables

    shared_attributes = ("tables",)

    @classmethod
    def build(
        cls, keys: Float[Tensor, "items dim"], tables: HeadTables, bits: int
    ) -> ProjectedIndex:
        """Project, quantise and pack the keys of one head into `bits` bits each."""
        dtype = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
        projected = (keys.float() - tables.key_mean) @ tables.key_projection[:, tables.used]
        words = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        for column, (channel, shift) in enumerate(zip(tables.used, tables.shifts, strict=True)):
            width = tables.bits[channel]
            step = tables.deviation[channel].clamp(min=1e-12) * STEP[width]
            code = torch.floor(torch.nan_to_num(projected[:, column]) / step).clamp(
                -(1 << (width - 1)), (1 << (width - 1)) - 1
            )
            words |= (code.long() + (1 << (width - 1))) << shift
        return cls(_wrap(words, dtype), tables)

    def decode(self) -> Float[Tensor, "items channels"]:
        """The quantised projections of all items, used channels only."""
        tables = self.tables
        words = self.words.long()[:, None]
        used_bits = [tables.bits[c] for c in tables.used]  # empty for a head of constant keys
        widths = torch.tensor(used_bits, dtype=torch.int64, device=words.device)
        shifts = torch.tensor(tables.shifts, dtype=torch.int64, device=words.device)
        codes = (words >> shifts) & ((1 << widths) - 1)
        steps = torch.tensor([STEP[bits] for bits in used_bits], device=words.device)
        centred = codes.float() - (1 << (widths - 1)).float() + 0.5
        return centred * (tables.deviation[tables.used] * steps)

    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Projected query times the decoded keys (key mean omitted: constant per row)."""
        return (query @ self.tables.query_projection[:, self.tables.used]) @ self.decode().T

    def tensors(self) -> tuple[Tensor, ...]:
        """The packed words; the tables belong to the profile and are shared by all requests."""
        return (self.words,)


def _wrap(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret the low bits of int64 words as a narrower signed integer."""
    if dtype is torch.int64:
        return words
    width = torch.iinfo(dtype).bits
    return torch.where(words >= 1 << (width - 1), words - (1 << width), words).to(dtype)


def build_index(
    strategy: Strategy, keys: Float[Tensor, "items chunk dim"], tables: HeadTables | None
) -> KeyIndex:
    """The index that `strategy` names, over the chunked keys of one head."""
    match strategy.index:
        case "mean":
            return MeanIndex.build(keys)
        case "minmax":
            return MinMaxIndex.build(keys)
        case "projected":
            assert tables is not None, "a projected index needs the profile's tables"
            return ProjectedIndex.build(keys[:, 0], tables, strategy.bits)
    raise AssertionError(f"no index named {strategy.index!r}")


@dataclass(frozen=True)
class FittedTables:
    """Result of `fit_projection`: float32 arrays for one head, bits per size."""

    key_projection: Float[Tensor, "dim channels"]
    query_projection: Float[Tensor, "dim channels"]
    deviation: Float[Tensor, " channels"]
    bits: dict[int, tuple[int, ...]]


def fit_projection(
    query_moment: Float[Tensor, "dim dim"],
    key_covariance: Float[Tensor, "dim dim"],
    sizes: tuple[int, ...],
    shrink: float = 0.05,
) -> FittedTables:
    """Query-aware projections of keys (docs/method.md), in float64.

    `query_moment` is the second moment of the group's scaled queries, shrunk by `shrink` of its
    mean diagonal; `key_covariance` that of post-RoPE keys. With M = Cq^(1/2) Ck Cq^(1/2) and its
    leading eigenvectors W, keys are projected by Cq^(1/2) W and queries by Cq^(-1/2) W.
    """
    moment = query_moment.double()
    dim = len(moment)
    ridge = shrink * moment.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(moment + ridge * torch.eye(dim, dtype=moment.dtype))
    root = vectors * values.clamp(min=1e-12).sqrt() @ vectors.T
    inverse = vectors / values.clamp(min=1e-12).sqrt() @ vectors.T
    variance, basis = torch.linalg.eigh(root @ key_covariance.double() @ root)
    channels = min(MAX_CHANNELS, dim)
    basis = basis.flip(-1)[:, :channels]
    deviation = variance.flip(-1)[:channels].clamp(min=0).sqrt()
    return FittedTables(
        key_projection=(root @ basis).float(),
        query_projection=(inverse @ basis).float(),
        deviation=deviation.float(),
        bits={size: allocate_bits(deviation.tolist(), size) for size in sizes},
    )


def allocate_bits(deviation: list[float], total: int) -> tuple[int, ...]:
    """Bits per channel, greedily by the drop in error sd^2 * (D(b) - D(b + 1)); at most 5 each."""
    bits = [0] * len(deviation)
    for _ in range(total):
        gains = [
            sd * sd * (DISTORTION[b] - DISTORTION[b + 1]) if b < 5 else -1.0
            for sd, b in zip(deviation, bits, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] <= 0:
            break
        bits[best] += 1
    return tuple(bits)
