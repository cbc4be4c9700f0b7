"""The profile: its fields, its checks, and its file, a versioned safetensors artefact.

Needs numpy and safetensors alone. The only module that knows the fields and tensor names, with
`tables` for those of its larger parts. docs/profile-format.md describes the bytes for readers in
other languages. A profile is data from strangers: everything is checked before it is used.
Planning works on arrays, and is loaded when a profile is first asked for a plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_bytes

from hkvprof.errors import ProfileError, UsageError
from hkvprof.files import strict_json
from hkvprof.files.atomic import write_atomically
from hkvprof.files.container import read_container
from hkvprof.heads import (
    CALIBRATED,
    EXACT_BITS,
    HeadGrid,
    KeepRule,
    ModelFingerprint,
    Rules,
    Strategy,
)
from hkvprof.profile.bounds import (
    check_budget,
    check_lengths,
    check_ratios,
    check_setting,
    expect,
    expect_shares,
    require,
)
from hkvprof.profile.certificate import Certificate, recorded
from hkvprof.profile.queries import QueryTables
from hkvprof.profile.sizes import ModelSizes, sizes_told
from hkvprof.profile.tables import HeadStatistics, ProjectedIndexTables
from hkvprof.profile.upgrade import mean_tokens, upgrade

if TYPE_CHECKING:
    from hkvprof.profile.budgets import Allocation, Budget, FetchLike
    from hkvprof.profile.costs import Menu
    from hkvprof.profile.forecast import Forecast

__all__ = ["SCHEMA_VERSION", "Profile", "ProjectedIndexTables", "load_profile"]

SCHEMA_VERSION = 4
METADATA_KEY = "hkvprof"
MAX_FILE_BYTES = 256 * 2**20
MAX_METADATA_BYTES = 4 * 2**20
_METADATA_KEYS = {
    "schema", "fingerprint", "recipe", "default_budget", "keep", "strategies", "kappas",
    "index_sizes", "planning", "provenance",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Profile:
    """What calibration found: curves for any budget, and a decision for the default one.

    Arrays are read-only; L layers, Hq query heads, Hkv KV heads, S strategies, R ratios, K kappas,
    A prompt lengths.

    - `strategies` [S]: the menu; `strategy` uint8 [L, Hkv] and `budget` float32 [L, Hkv] are the
      choice and the kept share of every head at `default_budget`.
    - `sparsity_mean`, `sparsity_std` float32 [K, L, Hq]: text-centric sparsity over samples, the
      attention mass of the top `kappas[k]` share of visible keys (HybridKV, stage 1).
    - `ratios` float32 [R], ascending to 1; `lengths` int64 [A], ascending: the prompts' tokens that
      curves were measured at; `loss` float32 [A, S, L, Hkv, R]: what planning minimises
      (INFEASIBLE, 1e30, where the strategy's fixed bytes exceed the ratio), on one scale at all
      lengths; `output_error` float32, same shape: || (o - o') W_O || / || y ||, the relative change
      of the layer's output.
    - `static_margin` float32 [A, L, Hkv, R]: by how much the best static strategy must lose less
      than the best dynamic one to be chosen; None: by nothing.
    - `rules`: how a `measured` profile is planned with.
    - `queries`: what queries after the prompt look like; None where no strategy's score asks them.
    - `statistics`: what query heads attend to; None in older profiles and in uniform ones.
    - `provenance`: recipe, counts of samples by task, skipped samples, library versions.
    """

    fingerprint: ModelFingerprint
    recipe: str
    default_budget: float
    keep: KeepRule
    strategies: tuple[Strategy, ...]
    kappas: tuple[float, ...]
    ratios: NDArray[np.float32]
    lengths: NDArray[np.int64]
    strategy: NDArray[np.uint8]
    budget: NDArray[np.float32]
    sparsity_mean: NDArray[np.float32]
    sparsity_std: NDArray[np.float32]
    loss: NDArray[np.float32]
    output_error: NDArray[np.float32]
    static_margin: NDArray[np.float32] | None = None
    index: ProjectedIndexTables | None = None
    queries: QueryTables | None = None
    statistics: HeadStatistics | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        check_setting(self.fingerprint, self.recipe, self.keep, self.strategies, self.kappas)
        check_budget(self.default_budget)
        self._check_provenance()
        self._check_curves()
        self._check_decisions()
        self._check_index()
        self._check_queries()
        if self.statistics is not None:
            self.statistics.check(self.grid)
        for array in self.tensors().values():
            array.flags.writeable = False

    @property
    def grid(self) -> HeadGrid:
        """The model's attention geometry."""
        return self.fingerprint.grid

    @property
    def has_curves(self) -> bool:
        """Whether losses were measured: `paper` measures none, those of `uniform` say nothing."""
        return self.recipe != "uniform" and len(self.ratios) > 1

    @cached_property
    def head_types(self) -> NDArray[np.uint8]:
        """[L, Hkv] HeadType values at the default budget."""
        types = np.array([s.head_type for s in self.strategies], dtype=np.uint8)[self.strategy]
        types.flags.writeable = False
        return types

    @property
    def certificate(self) -> Certificate | None:
        """What `hkvprof certify` found out; None where nothing is recorded, or it is of other
        content."""
        found = recorded(self.provenance)
        return found if found is not None and found.content == self.content_digest else None

    @property
    def sizes(self) -> ModelSizes | None:
        """How large the model is that was calibrated; None where that is not recorded."""
        return sizes_told(self.provenance)

    @property
    def content_digest(self) -> str:
        """SHA-256 of all that decides what a head keeps at any budget, whatever the provenance."""
        rules = [self.recipe, asdict(self.keep), [_told(one) for one in self.strategies]]
        total = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
        for name, array in sorted(self.tensors().items()):
            total.update(f"{name} {array.dtype.name} {array.shape}".encode())
            total.update(array.tobytes())
        return total.hexdigest()

    @property
    def usual_tokens(self) -> int:
        """Mean length of the prompts that it was calibrated on, else its middle length."""
        return mean_tokens(self.provenance) or int(self.lengths[len(self.lengths) // 2])

    @property
    def asks_queries(self) -> bool:
        """Whether a strategy scores tokens by the queries that the profile expects."""
        return any(strategy.score == CALIBRATED for strategy in self.strategies)

    def table_bytes(self, strategy: Strategy) -> int:
        """Device bytes of the constants of one head of this strategy, shared by all requests."""
        if strategy.score == CALIBRATED:
            return self.queries.head_bytes(self.grid.group) if self.queries else 0
        known = self.index.head_bytes if self.index and strategy.index == "projected" else {}
        return known.get(strategy.bits, 0)

    def position_bytes(self, tokens: int) -> int:
        """Most device bytes that positions of so many tokens take beside what heads hold."""
        from hkvprof.profile.costs import position_bytes

        asked = self.index is not None and any(s.index == "projected" for s in self.strategies)
        return tokens * position_bytes(self.index.axes) if self.index and asked else 0

    def loss_at(self, tokens: int) -> NDArray[np.float32]:
        """Loss curves [S, L, Hkv, R] for prompts of `tokens` tokens (profile.planning)."""
        from hkvprof.profile.planning import loss_between

        return loss_between(self.loss, self.lengths, tokens)

    def allocation(self, budget: float | int | str | Budget, tokens: int, itemsize: int = 2,
                   rows: int = 1, fetch: FetchLike = None,
                   int8_host: bool = False) -> Allocation:  # fmt: skip
        """Strategy, ratio and reads of every head for two budgets and one prompt length.

        `tokens` is the prompt's length, `itemsize` bytes per K/V element and `rows` the batch; the
        last two matter for budgets in bytes alone. `fetch` is what a decoding step may read from
        the host per row (budgets.Fetch; default: the knee), where items may have 8 bits
        (`int8_host`). A `paper` profile keeps its types and scales its ratios, and reads without a
        limit by default; a `measured` one is planned anew. Raises BudgetError.
        """
        from hkvprof.profile.dealing import check_share
        from hkvprof.profile.planning import loss_between, plan_anew, plan_scaled

        menu, share = self._question(budget, tokens, itemsize, rows)
        if share < 1:
            dense = max(1, tokens * self.grid.token_bytes(itemsize))
            share = check_share(share, menu.floor, self.position_bytes(tokens) / dense)
        menu = replace(menu, int8_host=int8_host)
        reads = self._reads(fetch, tokens, itemsize)
        loss = self.loss_at(tokens)
        if self.recipe == "measured":
            margin = self.static_margin
            if margin is not None:
                margin = loss_between(margin, self.lengths, tokens)
            return plan_anew(menu, loss, self.ratios, share, self.rules, margin, reads)
        kept = plan_scaled(menu, self.strategy, self.budget, loss, self.ratios, share, reads)
        if self.has_curves or self.recipe == "uniform":
            return kept
        unknown = np.full(kept.ratio.shape, np.nan)
        return replace(kept, expected_loss=float("nan"), head_loss=unknown)

    def plan(self, budget: float | int | str | Budget, tokens: int, itemsize: int = 2,
             rows: int = 1, fetch: FetchLike = None) -> Forecast:  # fmt: skip
        """What `rows` prompts of `tokens` tokens hold under a budget, read, head by head, and lose.

        Needs neither model nor torch. The figures are those of `apply` with its default options
        on prompts of at least its `min_tokens`. Raises BudgetError.
        """
        from hkvprof.profile.forecast import forecast

        menu, share = self._question(budget, tokens, itemsize, rows)
        allocation = self.allocation(share, tokens, itemsize, rows, fetch)
        tables = [self.table_bytes(strategy) for strategy in self.strategies]
        curves = self.loss_at(tokens) if self.has_curves else None
        measured = self.ratios if self.has_curves else np.zeros(1, dtype=np.float32)
        made = forecast(menu, allocation, share, rows, tables, measured, curves)
        positions = 0 if made.is_dense else rows * self.position_bytes(tokens)
        return replace(made, position_bytes=positions)

    def _question(self, budget: float | int | str | Budget, tokens: int, itemsize: int,
                  rows: int) -> tuple[Menu, float]:  # fmt: skip
        from hkvprof.profile.budgets import Budget
        from hkvprof.profile.costs import Menu

        dense = rows * tokens * self.grid.token_bytes(itemsize)
        menu = Menu(self.strategies, self.keep, self.grid.head_dim, tokens, itemsize)
        return menu, Budget.parse(budget).resolve(tokens, dense)

    def _reads(self, fetch: FetchLike, tokens: int, itemsize: int) -> float | None:
        from hkvprof.profile.budgets import Fetch

        return Fetch.parse(fetch).resolve(tokens * self.grid.token_bytes(itemsize))

    def _check_provenance(self) -> None:
        """Raise ProfileError for a certificate or sizes that are damaged, or anything but an
        object."""
        require(isinstance(self.provenance, Mapping), "provenance must be an object")
        recorded(self.provenance)
        sizes_told(self.provenance)

    def _check_curves(self) -> None:
        """Raise ProfileError unless what was measured has its shape, and values that can be."""
        grid, menu = self.grid, len(self.strategies)
        ratios, lengths, heads = len(self.ratios), len(self.lengths), (grid.layers, grid.kv_heads)
        expect("ratios", self.ratios, (ratios,), np.float32)
        expect("lengths", self.lengths, (lengths,), np.int64)
        shape = (len(self.kappas), grid.layers, grid.query_heads)
        for name in ("sparsity_mean", "sparsity_std"):
            expect(name, getattr(self, name), shape, np.float32)
            expect_shares(name, getattr(self, name))
        by_strategy = (lengths, menu, *heads, ratios)
        curves: dict[str, tuple[int, ...]] = {"loss": by_strategy, "output_error": by_strategy}
        if self.static_margin is not None:
            curves["static_margin"] = (lengths, *heads, ratios)
        for name, wanted in curves.items():
            expect(name, getattr(self, name), wanted, np.float32)
            require(bool((getattr(self, name) >= 0).all()), f"{name} holds negative values")
        check_ratios(self.ratios)
        check_lengths(self.lengths)

    def _check_decisions(self) -> None:
        """Raise ProfileError unless every head has a strategy of the menu, and a share."""
        heads, menu = (self.grid.layers, self.grid.kv_heads), len(self.strategies)
        expect("strategy", self.strategy, heads, np.uint8)
        expect("budget", self.budget, heads, np.float32)
        require(
            bool((self.strategy < menu).all()),
            f"strategy holds numbers beyond its {menu} entries",
        )
        require(
            bool((self.budget > 0).all()) and bool((self.budget <= 1).all()),
            "budget holds shares outside (0, 1]",
        )

    def _check_index(self) -> None:
        """Raise ProfileError unless the tables are sound, and of all sizes that the menu needs."""
        if self.index is not None:
            self.index.check(self.grid)
        needed = {s.bits for s in self.strategies if s.index == "projected"}
        have = set(self.index.sizes) if self.index else set()
        require(
            needed <= have,
            f"strategies need projected indexes of {sorted(needed)} bits, found {sorted(have)}",
        )

    def _check_queries(self) -> None:
        """Raise ProfileError unless the queries are sound, and there if the menu asks them."""
        if self.queries is not None:
            self.queries.check(self.grid)
        missing = self.asks_queries and self.queries is None
        require(not missing, "calibrated scores need queries.* tensors, and there are none")

    def save(self, path: str | Path) -> Path:
        """Write the profile atomically, deterministic to the byte. Raises HkvError."""
        path = Path(path)
        write_atomically(path, self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """The safetensors serialisation (canonical JSON metadata under one key)."""
        try:
            text = json.dumps(
                self._metadata(), sort_keys=True, separators=(",", ":"), allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise ProfileError(f"provenance and fingerprint must be plain JSON: {error}") from None
        tensors = {key: np.ascontiguousarray(value) for key, value in self.tensors().items()}
        return bytes(to_bytes(tensors, {METADATA_KEY: text}))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All arrays by their names in the file."""
        tensors: dict[str, NDArray[Any]] = {
            "ratios": self.ratios,
            "lengths": self.lengths,
            "strategy": self.strategy,
            "budget": self.budget,
            "sparsity_mean": self.sparsity_mean,
            "sparsity_std": self.sparsity_std,
            "loss": self.loss,
            "output_error": self.output_error,
        }
        if self.static_margin is not None:
            tensors["static_margin"] = self.static_margin
        if self.index is not None:
            tensors |= self.index.tensors()
        if self.queries is not None:
            tensors |= self.queries.tensors()
        if self.statistics is not None:
            tensors |= self.statistics.tensors()
        return tensors

    def _metadata(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "fingerprint": self.fingerprint.to_json(),
            "recipe": self.recipe,
            "default_budget": self.default_budget,
            "keep": asdict(self.keep),
            "planning": asdict(self.rules),
            "strategies": [s.to_json() for s in self.strategies],
            "kappas": list(self.kappas),
            "index_sizes": list(self.index.sizes) if self.index else [],
            "provenance": dict(self.provenance),
        }


def _told(strategy: Strategy) -> dict[str, Any]:
    """A strategy as it enters the digest: as files of version 3 tell it where it says the same."""
    told = strategy.to_json()
    if strategy.resident_bits == EXACT_BITS:
        del told["resident_bits"]
    return told


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile. Raises ProfileError for anything that is not a sound profile."""
    path = Path(path)
    metadata, tensors = _read(path)
    schema = metadata.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ProfileError(f"{path}: expected an integer schema version, found {schema!r}")
    if schema > SCHEMA_VERSION:
        raise ProfileError(
            f"{path} has schema version {schema}; this hkvprof reads up to {SCHEMA_VERSION}: "
            "upgrade with `pip install -U hkvprof`, or calibrate again with this version"
        )
    try:
        return _build(metadata, tensors)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ProfileError(
            f"{path}: the profile's metadata is incomplete or of the wrong kind "
            f"({type(error).__name__}: {error}); it may be damaged: fetch or calibrate it again"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        container = read_container(path, MAX_FILE_BYTES)
        text = container.metadata.get(METADATA_KEY)
        if text is None:
            raise ProfileError(
                f"{path} is a safetensors file without hkvprof metadata: expected a profile "
                "made by `hkvprof calibrate`"
            )
        if len(text) > MAX_METADATA_BYTES:
            raise ProfileError(f"{path}: metadata of {len(text):,} bytes is over the limit")
        metadata, tensors = strict_json.loads(text), container.tensors()
    except FileNotFoundError:
        raise ProfileError(
            f"no profile at {path}: make one with `hkvprof calibrate --model MODEL -o {path}`"
        ) from None
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ProfileError(
            f"{path} is not a readable profile ({error}): expected a safetensors file "
            "made by `hkvprof calibrate`, no model checkpoint; fetch it again or recalibrate"
        ) from error
    if not isinstance(metadata, dict):
        raise ProfileError(
            f"{path}: expected a JSON object as metadata, found {type(metadata).__name__}"
        )
    return metadata, tensors


def _build(metadata: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Profile:
    unknown = metadata.keys() - _METADATA_KEYS
    require(not unknown, f"unknown metadata {sorted(unknown)}")
    upgrade(metadata, tensors)
    tables = None
    if any(key.startswith("index.") for key in tensors):
        tables = ProjectedIndexTables.take(tuple(metadata["index_sizes"]), tensors)
    else:
        require(metadata["index_sizes"] == [], "index_sizes without index tensors")
    statistics = HeadStatistics.take(tensors)
    return Profile(
        fingerprint=ModelFingerprint.from_json(metadata["fingerprint"]),
        recipe=metadata["recipe"],
        default_budget=metadata["default_budget"],
        keep=KeepRule(**metadata["keep"]),
        rules=_rules(metadata["planning"]),
        strategies=tuple(Strategy.from_json(entry) for entry in metadata["strategies"]),
        kappas=tuple(metadata["kappas"]),
        provenance=metadata["provenance"],
        index=tables,
        queries=QueryTables.take(tensors),
        statistics=statistics,
        **tensors,
    )


def _rules(planning: dict[str, Any]) -> Rules:
    require(planning.keys() == asdict(Rules()).keys(), f"unknown planning {planning}")
    try:
        return Rules(**planning)
    except UsageError as error:
        raise ProfileError(f"planning: {error}") from None
