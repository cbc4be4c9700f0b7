"""Caches that are filled by hand: keys, values and profiles, and the tokens that steps are made of.

No prompt is read: at 131,072 tokens and 32 rows that would take longer than the benchmark may. Keys
have a falling spectrum (the i-th standard deviation is i^-0.75) in a random basis, runs of 64
tokens share half of their variance, as regions of an image or sentences do; values are noise. The
last rows' queries, which compression looks at, come from the same space. Decoding steps are real
passes of the model over tokens whose embeddings drift: x_t = DRIFT x_(t-1) + sqrt(1 - DRIFT^2)
noise, so that queries turn slowly. How slowly they turn decides how much dynamic heads fetch: the
hit rate is reported beside every figure that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hkvprof.bench.methods import Kind, check_budgets, uniform_types
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import UsageError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.adapter import ModelView
from hkvprof.models.shapes import SHAPES
from hkvprof.profile.budgets import Budget
from hkvprof.profile.record import Profile, ProjectedIndexTables
from hkvprof.runtime.graph import AHEAD, Recorder, take_step
from hkvprof.selection.quantiser import CHANNELS, fit_codebook, fit_projection

LEAST_TOKENS = 64
WARM_STEPS = 3
"""Steps before the first timed one; kernels are compiled and graphs recorded in them."""
DRIFT = 0.95
BITS, RERANK = 32, 64
"""The index of dynamic heads, as calibration likes it best (docs/retrieval.md)."""
KEEP = KeepRule(sinks=2, recent=4, window=16)
RUN = 64
POOL = 7
WALK = 256
"""Tokens of one row's walk of embeddings."""


@dataclass(frozen=True)
class FilledSetup:
    """What is asked of a shape. `steps` are the timed ones of a method, `minutes` is when no
    further context is begun; `layers` None: the shape's."""

    shape: str = "qwen2.5-vl-7b"
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    budgets: tuple[str, ...] = ("0.20", "0.10", "0.05")
    layers: int | None = None
    dtype: str = "auto"
    device: str = "cuda"
    steps: int = 32
    rounds: int = 4
    prefill_tokens: int = 32768
    link_megabytes: float = 1024
    minutes: float = 9.0

    def __post_init__(self) -> None:
        """Raises UsageError or BudgetError."""
        if self.shape not in SHAPES:
            raise UsageError(f"unknown shape {self.shape!r}: expected {' or '.join(SHAPES)}")
        check_budgets(self.budgets)
        for text in self.budgets:
            if Budget.parse(text).share is None:
                raise UsageError(
                    f"budget {text}: expected shares of the dense cache such as 0.10, because they "
                    "are compared across contexts and batches"
                )
        if not self.contexts or min(self.contexts) < LEAST_TOKENS:
            raise UsageError(f"expected contexts of at least {LEAST_TOKENS} tokens such as 8192")
        if not self.batches or min(self.batches) < 1:
            raise UsageError("expected batches of at least 1 row such as 1,8,32")
        if self.prefill_tokens < LEAST_TOKENS or self.minutes <= 0 or self.link_megabytes <= 0:
            raise UsageError(
                f"expected a prefill of at least {LEAST_TOKENS} tokens, and minutes above 0"
            )
        self._check_steps()

    def _check_steps(self) -> None:
        if self.rounds < 1 or self.steps // self.rounds < 2 or self.steps % self.rounds:
            raise UsageError(
                f"{self.steps} steps in {self.rounds} rounds: expected at least 2 in each, the "
                "same number in all"
            )
        if WARM_STEPS + self.rounds * self.block > AHEAD - 4:
            raise UsageError(
                f"{self.steps} steps in {self.rounds} rounds reach into the next compression: "
                "expected fewer, such as --steps 32 --rounds 4"
            )

    @property
    def block(self) -> int:
        """Steps of one method in one round, the first one, which is not timed, included."""
        return self.steps // self.rounds + 1

    @property
    def wanted(self) -> tuple[tuple[int, int], ...]:
        """Contexts and batches, smallest first."""
        pairs = {(context, batch) for context in self.contexts for batch in self.batches}
        return tuple(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair)))


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


def filled_profiles(model: Any, view: ModelView, keys: Keys) -> dict[Kind, Profile]:
    """All heads static, all dynamic, and in turns; the index fits the keys' covariance."""
    menu = (
        Strategy(HeadType.STATIC, pool=POOL),
        Strategy(HeadType.DYNAMIC, index="projected", bits=BITS, rerank=RERANK),
    )
    index = _fit_index(keys, (view.grid.layers, view.grid.kv_heads))
    return {
        kind: replace(uniform_profile(model, types, keep=KEEP), strategies=menu, index=index)
        for kind, types in uniform_types(view.grid).items()
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


class FullLayer(DynamicLayer):
    """Keys and values with room for `room` further tokens, appended at a place on the device.

    Attention goes over the whole room at every step, as SDPA's flash kernel does without a mask: a
    few tokens of thousands more than there are. transformers' StaticCache masks them instead, which
    on CUDA is slower.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, 0

    def fill(self, key: Tensor, value: Tensor) -> None:
        """The prompt [rows, kv_heads, tokens, dim]; copied."""
        self.lazy_initialization(key, value)
        rows, heads, tokens, dim = key.shape
        shape = (rows, heads, tokens + self.room, dim)
        self.keys, self.values = key.new_zeros(shape), value.new_zeros(shape)
        self.keys[:, :, :tokens], self.values[:, :, :tokens] = key, value
        self.seen = tokens
        self.place = torch.tensor([tokens], device=key.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append one token per row; all keys and values of the room."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        self.place += 1
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """The prompt's: positions are given, not counted."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole room, from its beginning."""
        return self.keys.shape[2], 0


def dense_cache(config: Any, layers: int, room: int | None) -> DynamicCache:
    """transformers' DynamicCache; with `room`, of FullLayers."""
    cache = DynamicCache(config=config)
    if room is not None:
        cache.layers = [FullLayer(room) for _ in range(layers)]
    return cache


class RecordedSteps:
    """`steps(ids)`: a pass over one token per row, recorded by `recorder` after the first."""

    def __init__(self, model: Any, cache: Any, tokens: int, rows: int, recorder: Recorder | None):
        self._model, self._cache, self._recorder = model, cache, recorder
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self._positions = torch.full_like(self._ids, tokens)
        self._replay: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows vocabulary"]:
        """Logits that follow these tokens."""
        self._ids.copy_(ids)
        if self._replay is not None:
            return self._replay()
        out = self._step()
        if self._recorder is not None:
            self._replay = self._recorder.record(self._step)
        return out

    def _step(self) -> Tensor:
        return take_step(self._model, self._ids, self._positions, self._cache)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decoding step reads: neither vision tower nor embedding table."""
    unread = model.get_input_embeddings().weight
    return sum(
        weight.nbytes
        for name, weight in model.named_parameters()
        if "visual" not in name and weight is not unread
    )
