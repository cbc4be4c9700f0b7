"""What the caches are filled with, and the tokens that steps are made of.

No prompt is read: at 131,072 tokens and 32 rows that would take longer than the benchmark may. Keys
have a falling spectrum (the i-th standard deviation is i^-0.75) in a random basis, runs of 64
tokens share half of their variance, as regions of an image or sentences do; values are noise. The
last rows' queries, which compression looks at, come from the same space. Decoding steps are real
passes of the model over tokens whose embeddings drift: x_t = DRIFT x_(t-1) + sqrt(1 - DRIFT^2)
noise, so that queries turn slowly. How slowly they turn decides how much dynamic heads fetch: the
hit rate is reported beside every figure that depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.adapter import ModelView
from hkvprof.profile.record import Profile, ProjectedIndexTables
from hkvprof.selection.quantiser import CHANNELS, fit_codebook, fit_projection

DRIFT = 0.95
BITS, RERANK = 32, 64
"""The index of dynamic heads, as calibration likes it best (docs/retrieval.md)."""
RUN = 64
POOL = 7
WALK = 256
"""Tokens of one row's walk of embeddings."""
TYPES = ("static", "dynamic", "hybrid")
"""All heads of one type; hybrid: every other KV head is dynamic."""


class Keys:
    """Keys, values and queries of every layer, the same each time they are asked for."""

    def __init__(self, view: ModelView, dtype: torch.dtype, device: torch.device) -> None:
        self.grid, self.dtype, self.device = view.grid, dtype, device
        dim = self.grid.head_dim
        random = torch.Generator().manual_seed(0)
        spectrum = torch.arange(1, dim + 1).float().pow(-0.75)
        basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=random))
        root = spectrum[:, None] * basis * (dim / spectrum.square().sum()).sqrt()
        self.root = root.to(device)

    def layer(
        self, number: int, rows: int, tokens: int
    ) -> tuple[
        Float[Tensor, "rows kv_heads tokens dim"], Float[Tensor, "rows kv_heads tokens dim"]
    ]:
        """One layer's dense keys and values."""
        random = torch.Generator(device=self.device).manual_seed(number + 1)
        heads, dim = self.grid.kv_heads, self.grid.head_dim
        shape = (rows, heads, tokens, dim)
        key, value = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for row in range(rows):
            runs = self._normal(random, heads, -(-tokens // RUN), dim)
            runs = runs.repeat_interleave(RUN, dim=1)[:, :tokens]
            mixed = runs.add_(self._normal(random, heads, tokens, dim)).mul_(2**-0.5)
            key[row] = mixed @ self.root
            value[row] = self._normal(random, heads, tokens, dim)
        return key, value

    def queries(self, number: int, rows: int, window: int) -> Tensor:
        """Queries of the last rows [rows, query_heads, window, dim]."""
        random = torch.Generator(device=self.device).manual_seed(-1 - number)
        made = self._normal(random, rows, self.grid.query_heads, window, self.grid.head_dim)
        return (made @ self.root).to(self.dtype)

    def _normal(self, random: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=self.device)


def profiles(model: Any, view: ModelView, keys: Keys) -> dict[str, Profile]:
    """One per TYPES, with the index fitted to the keys' covariance."""
    grid = view.grid
    shape = (grid.layers, grid.kv_heads)
    turns = np.arange(grid.total).reshape(shape) % 2
    kinds: dict[str, Any] = {"static": "static", "dynamic": "dynamic", "hybrid": turns}
    menu = (
        Strategy(HeadType.STATIC, pool=POOL),
        Strategy(HeadType.DYNAMIC, index="projected", bits=BITS, rerank=RERANK),
    )
    index = _fit_index(keys, shape)
    keep = KeepRule(sinks=2, recent=4, window=16)
    return {
        name: replace(uniform_profile(model, kinds[name], keep=keep), strategies=menu, index=index)
        for name in TYPES
    }


def _fit_index(keys: Keys, shape: tuple[int, int]) -> ProjectedIndexTables:
    """The constants of one head, given to all: every head's keys have the same covariance."""
    root = keys.root.cpu()
    random = torch.Generator().manual_seed(1)
    sample = torch.randn(4096, len(root), generator=random) @ root
    covariance = root.T @ root
    fit = fit_projection(covariance, covariance)
    codebook, owner = fit_codebook(sample @ fit.key_projection, fit.deviation, BITS)
    used = codebook.shape[1]
    assert used <= CHANNELS[BITS]

    def every(array: Any, dtype: Any) -> Any:
        one = np.asarray(array).astype(dtype)
        return np.broadcast_to(one, (*shape, *one.shape)).copy()

    return ProjectedIndexTables(
        sizes=(BITS,),
        key_projection=every(fit.key_projection, np.float16),
        query_projection=every(fit.query_projection, np.float16),
        key_mean=every(np.zeros(len(root)), np.float32),
        deviation=every(fit.deviation, np.float32),
        codebooks=(every(codebook, np.int8),),
        subspaces=(every(owner, np.uint8),),
    )


@torch.no_grad()
def drifting_tokens(model: Any, rows: int) -> Iterator[Int[Tensor, "rows 1"]]:
    """Tokens of one step after the other; the model's embeddings are overwritten with walks.

    Row r walks through the ids from r * WALK on. There are WALK steps, or fewer where the
    vocabulary does not hold that many for every row.
    """
    weight = model.get_input_embeddings().weight
    steps = min(WALK, len(weight) // rows)
    random = torch.Generator(device=weight.device).manual_seed(7)
    deviation = float(model.config.get_text_config().initializer_range)

    def noise() -> Tensor:
        shape = (rows, weight.shape[1])
        return torch.randn(*shape, generator=random, device=weight.device) * deviation

    state = noise()
    starts = torch.arange(rows, device=weight.device) * steps
    for step in range(steps):
        weight[starts + step] = state.to(weight.dtype)
        state = DRIFT * state + (1 - DRIFT**2) ** 0.5 * noise()
    ids = starts[:, None]
    for step in range(steps):
        yield ids + step
