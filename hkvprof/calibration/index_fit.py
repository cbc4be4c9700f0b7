"""Moments of queries and keys over calibration samples, and the projected index fitted to them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.heads import HeadGrid
from hkvprof.profile.record import ProjectedIndexTables
from hkvprof.selection.index import HeadTables
from hkvprof.selection.quantiser import fit_codebook, fit_projection
from hkvprof.selection.rotary import Positions, RotatingKeys

if TYPE_CHECKING:
    from hkvprof.samples.record import Sample

T = TypeVar("T")

SAMPLED_KEYS = 4096
"""Prompt keys per head that codebooks are fitted to."""
LARGE_PAIR = 0.5
"""A rotary pair of a bias is taken out of keys from this share of a mean pair's variance on."""
FIT_SAMPLES = 64
FIT_TOKENS = 65_536
"""The index is fitted on up to FIT_SAMPLES samples, but at least 16 and then no more than these."""


def is_enough(samples: int, tokens: int) -> bool:
    """Whether an index that has seen so many needs no more: FIT_SAMPLES, or 16 with FIT_TOKENS."""
    return samples >= FIT_SAMPLES or (samples >= 16 and tokens >= FIT_TOKENS)


def spread(samples: Sequence[T]) -> list[T]:
    """The samples in an order of which every beginning is spread evenly over the list."""
    golden = (math.sqrt(5) - 1) / 2
    places = sorted(range(len(samples)), key=lambda i: (i * golden) % 1.0)
    return [samples[i] for i in places]


class KeySample:
    """Vectors of one layer drawn evenly from all samples, such as prompt keys; float16 on the host.

    Every (sample, position) has a hash; the `most` least ones stay, in the order of their hashes.
    So neither the draw nor its order depends on the order of the samples.
    """

    def __init__(self, most: int = SAMPLED_KEYS) -> None:
        self._most = most
        self._hashes = np.empty(0, np.uint64)
        self._keys: Tensor | None = None

    def add(self, key: Float[Tensor, "heads tokens dim"], sample: str) -> None:
        """Offer one sample's keys."""
        hashes = _hashes(sample, key.shape[1])
        chosen = np.argsort(hashes)[: self._most]
        new = key[:, torch.from_numpy(chosen).to(key.device)].half().cpu()
        keys = new if self._keys is None else torch.cat([self._keys, new], dim=1)
        hashes = np.concatenate([self._hashes, hashes[chosen]])
        best = np.argsort(hashes, kind="stable")[: self._most]
        self._hashes, self._keys = hashes[best], keys[:, torch.from_numpy(best)]

    @property
    def keys(self) -> Float[Tensor, "heads sampled dim"]:
        """What was drawn, in an order that means nothing."""
        assert self._keys is not None, "no keys were added"
        return self._keys


def _hashes(sample: str, tokens: int) -> NDArray[np.uint64]:
    """A number per position: SplitMix64 (Steele et al., OOPSLA 2014) from the sample's id."""
    digest = hashlib.blake2b(sample.encode(), digest_size=8).digest()
    state = np.arange(1, tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.frombuffer(digest, "<u8")
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Moments:
    """Running second moments per KV head, in float64 on the host, and a sample of the keys.

    Queries: sum over rows and group of (scaling * q)(scaling * q)^T; keys: sums for mean and
    covariance. Adding samples in another order changes results by rounding only. Keys count without
    what `rotating` says that turns in them, as far as it is large beside what else the first
    sample's keys have in a pair, on average (LARGE_PAIR).
    """

    def __init__(self, grid: HeadGrid, rotating: RotatingKeys | None = None) -> None:
        shape = (grid.layers, grid.kv_heads, grid.head_dim)
        self.group, self.rotating = grid.group, rotating
        self._chosen: set[int] = set()
        """Layers whose pairs are chosen."""
        self.query = torch.zeros(*shape, grid.head_dim, dtype=torch.float64)
        self.query_rows = torch.zeros(grid.layers, dtype=torch.float64)
        self.key = torch.zeros(*shape, grid.head_dim, dtype=torch.float64)
        self.key_sum = torch.zeros(shape, dtype=torch.float64)
        self.key_rows = torch.zeros(grid.layers, dtype=torch.float64)
        self.sampled = [KeySample() for _ in range(grid.layers)]

    def add_queries(
        self, layer: int, query: Float[Tensor, "query_heads rows dim"], scaling: float
    ) -> None:
        """Count rows of scaled queries."""
        heads, rows, dim = query.shape
        grouped = (query.float() * scaling).reshape(heads // self.group, self.group * rows, dim)
        self.query[layer] += (grouped.transpose(1, 2) @ grouped).double().cpu()
        self.query_rows[layer] += self.group * rows

    def add_keys(
        self,
        layer: int,
        key: Float[Tensor, "kv_heads tokens dim"],
        sample: str,
        positions: Positions | None = None,
    ) -> None:
        """Count the prompt keys of the sample of that id, which stand at these positions."""
        key = key.float()
        if self.rotating is not None:
            assert positions is not None, "keys with a bias need their positions"
            key = self._still(layer, key, positions)
        self.key[layer] += (key.transpose(1, 2) @ key).double().cpu()
        self.key_sum[layer] += key.sum(dim=1).double().cpu()
        self.key_rows[layer] += key.shape[1]
        self.sampled[layer].add(key, sample)

    def _still(self, layer: int, key: Tensor, positions: Positions) -> Tensor:
        """Keys without the bias that turns in them."""
        assert self.rotating is not None
        heads = zip(self.rotating.heads(layer, key.device), key, strict=True)
        still = torch.stack([bias.removed(own, positions) for bias, own in heads])
        if layer in self._chosen:
            return still
        self._chosen.add(layer)
        energy = LARGE_PAIR * 2 * still.var(dim=1, correction=0).mean(dim=1)
        self.rotating = self.rotating.where_larger(layer, energy.double().cpu().numpy())
        return self._still(layer, key, positions)

    def fit(self, sizes: tuple[int, ...]) -> ProjectedIndexTables:
        """Projections, deviations and codebooks for every head."""
        layers, kv_heads = self.key_sum.shape[:2]
        mean = self.key_sum / self.key_rows[:, None, None]
        covariance = (
            self.key / self.key_rows[:, None, None, None] - mean[..., None] * mean[..., None, :]
        )
        moment = self.query / self.query_rows[:, None, None, None]
        names = ["key_projection", "query_projection", "deviation"]
        fits: dict[str, list[NDArray[np.generic]]] = {name: [] for name in names}
        for size in sizes:
            fits |= {f"codebook_{size}": [], f"subspace_{size}": []}
        for i in range(layers):
            for j in range(kv_heads):
                fitted = fit_projection(moment[i, j], covariance[i, j])
                for name in names:
                    fits[name].append(getattr(fitted, name).numpy())
                keys = self.sampled[i].keys[j].float() - mean[i, j].float()
                for size in sizes:
                    pair = fit_codebook(keys @ fitted.key_projection, fitted.deviation, size)
                    fits[f"codebook_{size}"].append(pair[0])
                    fits[f"subspace_{size}"].append(pair[1])
        arrays = {
            f"index.{name}": np.stack(rows).reshape(layers, kv_heads, *rows[0].shape)
            for name, rows in fits.items()
        }
        for name in names[:2]:
            arrays[f"index.{name}"] = arrays[f"index.{name}"].astype(np.float16)
        arrays["index.key_mean"] = mean.float().numpy()
        if self.rotating is not None and self.rotating.most_pairs:
            arrays |= {"index.key_bias": self.rotating.bias, "index.axis": self.rotating.axis}
            arrays["index.frequency"] = self.rotating.frequency
        return ProjectedIndexTables.take(sizes, arrays)


def until_enough(
    samples: Sequence[Sample], moments: Moments, skipped: Collection[str]
) -> Iterator[Sample]:
    """Samples spread evenly over the list, until `moments`, to which the caller adds each of them
    but the `skipped`, have seen enough."""
    used = 0
    for sample in spread(samples):
        if is_enough(used, int(moments.key_rows.max())):
            return
        yield sample
        used += sample.id not in skipped


def tables_of_layer(
    tables: ProjectedIndexTables, layer: int, device: torch.device
) -> dict[tuple[int, int], HeadTables]:
    """The constants of one layer's heads by (head, bits), as float32 on `device`."""
    heads = range(tables.deviation.shape[1])
    return {
        (head, size): HeadTables.load(tables, layer, head, size, device)
        for size in tables.sizes
        for head in heads
    }
