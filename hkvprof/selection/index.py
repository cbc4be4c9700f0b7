"""Indexes of dynamic heads: small device-side summaries of the tokens that live on the host.

One interface, three kinds, named in the profile: `mean` and `minmax` digests per chunk (HybridKV
section 3.3; Quest, arXiv 2406.10774) and `projected`, a query-aware projection of every key,
quantised to 16, 32 or 64 bits (quantiser, docs/method.md). Calibration and runtime share this code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.heads import Strategy
from hkvprof.profile.tables import ProjectedIndexTables
from hkvprof.selection.quantiser import CODE_UNIT, Encoder, Subspaces, encode
from hkvprof.selection.rotary import Positions, RotatingBias

CHUNK_TOKENS = 8192
"""Tokens projected and encoded at a time: about 20 MiB of temporary memory at width 128."""


@dataclass(frozen=True)
class HeadTables:
    """Projected-index constants of one KV head on the device, as float32.

    Channels are ordered so that those of a code are neighbours; `subspaces` says, per code, which
    is its first and which one is past its last. `codebook` is in the units of projected keys.
    `bias` is taken out of keys before anything else is done with them.
    """

    query_projection: Float[Tensor, "dim channels"]
    key_projection: Float[Tensor, "dim channels"]
    key_mean: Float[Tensor, " dim"]
    codebook: Float[Tensor, "centroids channels"]
    subspaces: Subspaces
    encoder: Encoder = encode
    bias: RotatingBias | None = None

    @classmethod
    def load(
        cls,
        arrays: ProjectedIndexTables,
        layer: int,
        head: int,
        bits: int,
        device: torch.device,
        encoder: Encoder = encode,
    ) -> HeadTables:
        """One head's constants for an index of `bits` bits per token."""
        size = arrays.sizes.index(bits)
        owner = arrays.subspaces[size][layer, head]
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=bits // 8)).tolist()
        unit = arrays.deviation[layer, head][order] * np.float32(CODE_UNIT)

        def put(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.array(array, dtype=np.float32, order="C")).to(device)

        return cls(
            query_projection=put(arrays.query_projection[layer, head][:, order]),
            key_projection=put(arrays.key_projection[layer, head][:, order]),
            key_mean=put(arrays.key_mean[layer, head]),
            codebook=put(arrays.codebooks[size][layer, head][:, order] * unit),
            subspaces=tuple(pairwise([0, *ends])),
            encoder=encoder,
            bias=_bias_of(arrays, layer, head, device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The device tensors, for counting their bytes."""
        own = (self.query_projection, self.key_projection, self.key_mean, self.codebook)
        return own if self.bias is None else (*own, *self.bias.tensors())

    def encode(
        self, keys: Float[Tensor, "items dim"], positions: Positions | None = None
    ) -> UInt8[Tensor, "items codes"]:
        """The codes of keys at these positions, CHUNK_TOKENS at a time."""
        parts = [
            self.encoder(
                (self._still(part, positions, number * CHUNK_TOKENS) - self.key_mean)
                @ self.key_projection,
                self.codebook,
                self.subspaces,
            )
            for number, part in enumerate(keys.split(CHUNK_TOKENS))
        ]
        return torch.cat(parts)

    def _still(self, keys: Tensor, positions: Positions | None, first: int) -> Tensor:
        """Keys without what turns, of which the first is number `first` of `positions`."""
        if self.bias is None:
            return keys.float()
        assert positions is not None, "keys with a bias need their positions"
        return self.bias.removed(keys, positions.part(first, len(keys)))


def _bias_of(
    arrays: ProjectedIndexTables, layer: int, head: int, device: torch.device
) -> RotatingBias | None:
    if arrays.key_bias is None or arrays.frequency is None or arrays.axis is None:
        return None
    return RotatingBias.load(
        arrays.key_bias[layer, head], arrays.frequency, arrays.axis, arrays.pairs, device
    )


class KeyIndex(ABC):
    """What the device knows about the host-side items of one dynamic head."""

    positions: Positions | None = None
    """Of the items, where the index goes by them."""

    @abstractmethod
    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Estimated (unscaled) attention logits of every item, up to a constant per row."""

    @property
    @abstractmethod
    def items(self) -> int:
        """How many items are indexed."""

    @abstractmethod
    def append(
        self, keys: Float[Tensor, "new_items chunk dim"], positions: Positions | None = None
    ) -> KeyIndex:
        """An index of the same kind with these items at the end; `positions` of all its items where
        the index goes by them."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The device tensors that this index holds per request."""

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyIndex:
        """The index itself: it never changes, so copies of a cache share it."""
        return self

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

    @property
    def items(self) -> int:
        """How many chunks are indexed."""
        return len(self.mean)

    def append(
        self, keys: Float[Tensor, "new_items chunk dim"], positions: Positions | None = None
    ) -> MeanIndex:
        """An index that holds these chunks, too."""
        return MeanIndex(torch.cat([self.mean, self.build(keys).mean]))

    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Dot product with the mean key."""
        return query @ self.mean.float().T

    def tensors(self) -> tuple[Tensor, ...]:
        """The mean keys, one tensor [chunks, dim]."""
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

    @property
    def items(self) -> int:
        """How many chunks are indexed."""
        return len(self.low)

    def append(
        self, keys: Float[Tensor, "new_items chunk dim"], positions: Positions | None = None
    ) -> MinMaxIndex:
        """An index that holds these chunks, too."""
        new = self.build(keys)
        return MinMaxIndex(torch.cat([self.low, new.low]), torch.cat([self.high, new.high]))

    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Sum over channels of max(q * low, q * high)."""
        return query.clamp(min=0) @ self.high.float().T + query.clamp(max=0) @ self.low.float().T

    def tensors(self) -> tuple[Tensor, ...]:
        """Smallest and largest keys, two tensors [chunks, dim]."""
        return (self.low, self.high)


@dataclass(frozen=True)
class ProjectedIndex(KeyIndex):
    """A few one-byte codes per token: the projected, product-quantised key."""

    codes: UInt8[Tensor, "items codes"]
    tables: HeadTables
    positions: Positions | None = None
    """Of the items, where the tables have a bias; heads and layers share them."""

    shared_attributes = ("tables",)

    @classmethod
    def build(
        cls,
        keys: Float[Tensor, "items dim"],
        tables: HeadTables,
        positions: Positions | None = None,
    ) -> ProjectedIndex:
        """Project and encode the keys of one head."""
        return cls(tables.encode(keys, positions), tables, positions)

    @property
    def items(self) -> int:
        """How many tokens are indexed."""
        return len(self.codes)

    def append(
        self, keys: Float[Tensor, "new_items chunk dim"], positions: Positions | None = None
    ) -> ProjectedIndex:
        """An index that holds these tokens, too (a chunk is one token)."""
        own = None if positions is None else positions.part(self.items, len(keys))
        codes = torch.cat([self.codes, self.tables.encode(keys[:, 0], own)])
        return replace(self, codes=codes, positions=positions)

    def lut(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows codes 256"]:
        """What every centroid of every code adds to a logit."""
        projected = query.float() @ self.tables.query_projection
        parts = [
            projected[..., first:end] @ self.tables.codebook[:, first:end].T
            for first, end in self.tables.subspaces
        ]
        return torch.stack(parts, dim=-2)

    def logits(self, query: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows items"]:
        """Projected query times the decoded keys (key mean omitted: constant per row), and the
        query times their rotated bias."""
        table, bias = self.lut(query), self.tables.bias
        total = table.new_zeros(*table.shape[:-2], self.items)
        if bias is not None:
            assert self.positions is not None, "keys with a bias need their positions"
            total += bias.logits(query.float(), self.positions)
        for code in range(self.codes.shape[1]):
            total += table[..., code, :].index_select(-1, self.codes[:, code].int())
        return total

    def tensors(self) -> tuple[Tensor, ...]:
        """The codes; the tables belong to the profile and are shared by all requests."""
        return (self.codes,)


class Ranking:
    """Which items are fetched, for any number of hot ones and of candidates reranked.

    `score` [rows, items] is the index's; `logits` [rows, group, items], needed to rerank, are exact
    and scaled.
    """

    def __init__(
        self,
        score: Float[Tensor, "rows items"],
        logits: Float[Tensor, "rows group items"] | None,
    ) -> None:
        self._order = score.argsort(dim=-1, descending=True)
        if logits is None:
            return
        weight = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        order = self._order[:, None].expand_as(weight)
        self._weight = weight.gather(-1, order)
        self._total = self._weight.cumsum(dim=-1)

    def best(self, hot: int, more: int) -> Int[Tensor, "rows hot"]:
        """The `hot` best items: by score, or by exact keys among `more` candidates beyond them.

        Exact: softmax per query head over the candidates, mean over the group.
        """
        count = min(hot + more, self._order.shape[-1])
        if count == hot or not more:
            return self._order[:, :hot]
        total = self._total[..., count - 1 : count].clamp(min=1e-30)
        share = (self._weight[..., :count] / total).mean(dim=-2)
        last = share.topk(count - hot, dim=-1, largest=False, sorted=False).indices
        kept = torch.ones_like(share, dtype=torch.bool).scatter_(-1, last, False)
        return self._order[:, :count][kept].view(-1, hot)


def build_index(
    strategy: Strategy,
    keys: Float[Tensor, "items chunk dim"],
    tables: HeadTables | None,
    positions: Positions | None = None,
) -> KeyIndex:
    """The index that `strategy` names, over the chunked keys of one head at these positions, which
    tables with a bias ask for."""
    match strategy.index:
        case "mean":
            return MeanIndex.build(keys)
        case "minmax":
            return MinMaxIndex.build(keys)
        case "projected":
            assert tables is not None, "a projected index needs the profile's tables"
            return ProjectedIndex.build(keys[:, 0], tables, positions)
    raise AssertionError(f"no index named {strategy.index!r}")
