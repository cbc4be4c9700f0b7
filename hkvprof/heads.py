"""Plain records: attention heads, the model they belong to, and the rules that they are treated by.

No torch, no numpy.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

from hkvprof.errors import UsageError


class HeadType(enum.IntEnum):
    """What the runtime does with a KV head (HybridKV, arXiv 2604.05887, section 3)."""

    STATIC = 0
    """Pruned once, at the end of prefill; the rest is gone for good."""
    DYNAMIC = 1
    """Kept whole in host memory, indexed on the device, fetched on demand at every step."""


class Modality(enum.IntEnum):
    """What a prompt position holds. `CONTEXT` is long text that plays the part of vision tokens."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    CONTEXT = 3


@dataclass(frozen=True)
class HeadGrid:
    """Attention geometry of a decoder: `layers` x `kv_heads`, each serving `group` query heads."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def total(self) -> int:
        """KV heads in all layers together."""
        return self.layers * self.kv_heads

    def token_bytes(self, itemsize: int) -> int:
        """Bytes of dense keys and values of one token in all layers."""
        return 2 * self.total * self.head_dim * itemsize


MOST_ADAPTERS = 64
"""Names of adapters that a fingerprint holds."""
_OTHER_WEIGHTS = (
    "calibrated on other weights of this architecture (a fine-tune, or another checkpoint)"
)


@dataclass(frozen=True)
class ModelFingerprint:
    """Identity of a model in three tiers.

    `grid`, `architecture`, `rope` and `vision` must match; a differing `config_hash` only warns;
    the rest is provenance. `weights_digest` is a sampled digest of the query, key and value
    projections that tells a fine-tune from its base. `quantisation` names how the weights are
    stored ("bitsandbytes-4bit"), `adapters` those that shape the model's answers, by name.
    """

    architecture: str
    grid: HeadGrid
    rope: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    weights_digest: str = ""
    hub_id: str = ""
    commit: str = ""
    quantisation: str = ""
    adapters: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; the inverse of `from_json`. `quantisation` and `adapters` are left out
        where there are none."""
        data = asdict(self)
        for name in ("quantisation", "adapters"):
            if not data[name]:
                del data[name]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelFingerprint:
        """Build from the dict that `to_json` made. Raises KeyError or TypeError on wrong data."""
        adapters = data.get("adapters", ())
        if not isinstance(adapters, list | tuple):
            raise TypeError(f"adapters must be a list, found {type(adapters).__name__}")
        return cls(**{**data, "grid": HeadGrid(**data["grid"]), "adapters": tuple(adapters)})

    def mismatches(self, other: ModelFingerprint) -> list[str]:
        """The fields that must match and do not, each as `name: mine != theirs`."""
        pairs = [("architecture", self.architecture, other.architecture)]
        pairs += [
            (f"grid.{name}", mine, getattr(other.grid, name))
            for name, mine in asdict(self.grid).items()
        ]
        for tier in ("rope", "vision"):
            mine, theirs = getattr(self, tier), getattr(other, tier)
            pairs += [
                (f"{tier}.{key}", mine.get(key), theirs.get(key))
                for key in sorted(mine.keys() | theirs.keys())
            ]
        return [f"{name}: {a!r} != {b!r}" for name, a, b in pairs if a != b]

    def remarks(self, other: ModelFingerprint) -> list[str]:
        """How the weights of `other`, a model, differ from those calibrated; empty where they are
        the same, or one of the two is not known."""
        if "" in (self.weights_digest, other.weights_digest):
            return []
        if self.weights_digest == other.weights_digest:
            return []
        found = []
        if self.quantisation != other.quantisation:
            mine, theirs = (_stored(each) for each in (self, other))
            found.append(f"calibrated on {mine}, the model has {theirs}")
        if self.adapters != other.adapters:
            mine, theirs = (_adapted(each) for each in (self, other))
            found.append(f"calibrated {mine}, the model runs {theirs}")
        return found or [_OTHER_WEIGHTS]


def _stored(fingerprint: ModelFingerprint) -> str:
    kind = fingerprint.quantisation
    return f"quantised weights ({kind})" if kind else "unquantised weights"


def _adapted(fingerprint: ModelFingerprint) -> str:
    names = fingerprint.adapters
    if not names:
        return "without adapters"
    return f"with the adapter{'s' if len(names) > 1 else ''} {', '.join(names)}"


WINDOW, CALIBRATED = SCORES = ("window", "calibrated")
"""Whose attention a static strategy scores tokens by: the last prompt rows', or that of the queries
that a profile expects (selection.static)."""
EXACT_BITS = 16
"""Stands for the model's own dtype, whatever its width."""


@dataclass(frozen=True)
class Strategy:
    """One way to treat a KV head: an entry of a profile's menu.

    A static strategy scores the prompt once, by the attention of its last rows (`score` "window")
    or of queries that the profile expects after it ("calibrated"): average pooling over `pool`
    neighbours; `text_prior` is the largest share of the kept tokens that text positions may claim
    first (method: docs/method.md, "Static scores"). A dynamic one
    keeps chunks of `chunk` tokens in host memory behind an index: `mean` or `minmax` digests per
    chunk, or `projected`, `bits` bits per token (method: docs/method.md, "The projected index").
    With `rerank` n the index names n items more than have room, and their exact keys, read from
    host memory, decide which of them have it.

    `resident_bits` below EXACT_BITS is the precision of what stays on the device beside sinks and
    recent tokens: kept tokens of a static head, hot items of a dynamic one (selection.residents).
    """

    head_type: HeadType
    pool: int = 1
    text_prior: float = 0.0
    index: str = ""
    chunk: int = 1
    bits: int = 0
    rerank: int = 0
    resident_bits: int = EXACT_BITS
    score: str = WINDOW

    @property
    def name(self) -> str:
        """Short unique name, for tables and command lines."""
        exact = self.resident_bits == EXACT_BITS
        return self._method + ("" if exact else f"-int{self.resident_bits}")

    @property
    def _method(self) -> str:
        if self.head_type is HeadType.STATIC:
            prior = f"-text{self.text_prior:g}" if self.text_prior else ""
            told = "" if self.score == WINDOW else f"{self.score}-"
            return f"static-{told}pool{self.pool}{prior}"
        detail = f"{self.bits}bit" if self.index == "projected" else f"chunk{self.chunk}"
        again = f"-rerank{self.rerank}" if self.rerank else ""
        return f"dynamic-{self.index}-{detail}{again}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; the inverse of `from_json`. A `score` by the window is left out."""
        data = {**asdict(self), "head_type": self.head_type.name.lower()}
        if self.score == WINDOW:
            del data["score"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Strategy:
        """Build from the dict that `to_json` made. Raises KeyError or TypeError on wrong data."""
        return cls(**{**data, "head_type": HeadType[data["head_type"].upper()]})


@dataclass(frozen=True)
class KeepRule:
    """Tokens that every compressed head keeps, and how static scores are observed.

    The first `sinks` and the last `recent` prompt tokens always stay; static scores come from the
    last `window` prompt rows.
    """

    sinks: int = 4
    recent: int = 8
    window: int = 16

    @property
    def floor_tokens(self) -> int:
        """Fewest tokens a compressed head may hold: sinks, recent and one more."""
        return self.sinks + self.recent + 1


EVEN = 0.75
"""Part of the budget that all heads get alike (docs/experiments.md, "Budgets dealt evenly")."""


@dataclass(frozen=True)
class Rules:
    """How a measured profile is planned with: from curves to the budgets and types of heads.

    The part `even` of the budget is dealt evenly, the rest by loss: losses are measured one head at
    a time, and those of heads that are compressed together do not add up. Raises UsageError for a
    number out of range.
    """

    even: float = EVEN

    def __post_init__(self) -> None:
        if not 0 <= self.even <= 1:
            raise UsageError(f"the part dealt evenly must lie in [0, 1], found {self.even}")
