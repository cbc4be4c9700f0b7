"""Under which conditions samples were measured: rows of other conditions cannot be merged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import hkvprof
from hkvprof.files import strict_json
from hkvprof.heads import HeadGrid, KeepRule, ModelFingerprint, Strategy
from hkvprof.profile.bounds import check_ratios, check_setting, require

ROW_SCHEMA = 2
"""What a row holds; folders before it was recorded have 1."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Conditions:
    """The model, what was measured of it, and with which versions.

    `dtype` is that of the weights and K/V, `replies` "given" or "own" (whatever they are, a `paper`
    row does not depend on them), `versions` those of hkvprof, torch and transformers, `row_schema`
    that of the rows' files. `ratios` of the loss curves: 1 alone where none are measured.
    """

    fingerprint: ModelFingerprint
    recipe: str
    strategies: tuple[Strategy, ...]
    keep: KeepRule
    kappas: tuple[float, ...]
    ratios: tuple[float, ...]
    replies: str
    dtype: str
    versions: tuple[tuple[str, str], ...]
    row_schema: int = ROW_SCHEMA

    @property
    def grid(self) -> HeadGrid:
        """The model's attention geometry."""
        return self.fingerprint.grid

    @property
    def itemsize(self) -> int:
        """Bytes per K/V element."""
        return torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()

    @property
    def digest(self) -> str:
        """Of everything: rows carry it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON; the inverse of `from_json`."""
        return json.dumps(self._plain(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Conditions:
        """Checked. Raises ValueError, KeyError, TypeError, AttributeError or ProfileError."""
        data = strict_json.loads(text)
        found = cls(
            fingerprint=ModelFingerprint.from_json(data["fingerprint"]),
            recipe=str(data["recipe"]),
            strategies=tuple(Strategy.from_json(entry) for entry in data["strategies"]),
            keep=KeepRule(**data["keep"]),
            kappas=tuple(float(kappa) for kappa in data["kappas"]),
            ratios=tuple(float(ratio) for ratio in data["ratios"]),
            replies=str(data["replies"]),
            dtype=str(data["dtype"]),
            versions=tuple(sorted((str(k), str(v)) for k, v in data["versions"].items())),
            row_schema=int(data.get("row_schema", 1)),
        )
        check_setting(found.fingerprint, found.recipe, found.keep, found.strategies, found.kappas)
        require(all(0 < ratio <= 1 for ratio in found.ratios), "ratios must lie in (0, 1]")
        check_ratios(np.array(found.ratios, dtype=np.float32))
        require(found.dtype in DTYPES, f"unknown dtype {found.dtype[:40]!r}")
        return found

    def differences(self, other: Conditions) -> list[str]:
        """Names of the fields in which another's differ."""
        mine, theirs = self._plain(), other._plain()
        return [name for name in mine if mine[name] != theirs[name]]

    def _plain(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint.to_json(),
            "recipe": self.recipe,
            "strategies": [strategy.to_json() for strategy in self.strategies],
            "keep": asdict(self.keep),
            "kappas": list(self.kappas),
            "ratios": list(self.ratios),
            "replies": self.replies,
            "dtype": self.dtype,
            "versions": dict(self.versions),
            "row_schema": self.row_schema,
        }


def current_versions() -> tuple[tuple[str, str], ...]:
    """Versions that a measurement depends on."""
    import transformers

    return (
        ("hkvprof", hkvprof.__version__),
        ("torch", str(torch.__version__)),
        ("transformers", transformers.__version__),
    )
