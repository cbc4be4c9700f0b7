"""How large the calibrated model is, as a record: it stands in a profile's provenance.

It is what planning asks beside the heads: the bytes of the weights, and the longest context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.profile.bounds import MOST_TOKENS, ProvenanceReader

KEY = "model"
"""Where the record stands in a profile's provenance."""
_READ = ProvenanceReader(KEY, "calibrate or merge")
_MOST_BYTES = 2**60


@dataclass(frozen=True)
class ModelSizes:
    """`weight_bytes` of the weights in 16 bits an element (packed ones as they are packed) and
    `full_weight_bytes` in 32; `longest_context` in tokens, None where the config does not say."""

    weight_bytes: int
    full_weight_bytes: int
    longest_context: int | None

    def weights(self, itemsize: int) -> int:
        """Bytes of the weights in a dtype of so many bytes: 2 or 4."""
        return self.full_weight_bytes if itemsize > 2 else self.weight_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ModelSizes:
        """Build from a stranger's JSON, checked. Raises ProfileError."""
        found = _READ.mapping(data, "the record")
        if found.keys() != cls.__dataclass_fields__.keys():
            raise _READ.wrong("the record", f"{', '.join(cls.__dataclass_fields__)}", data)
        for name, most in (("weight_bytes", _MOST_BYTES), ("full_weight_bytes", _MOST_BYTES),
                           ("longest_context", MOST_TOKENS)):  # fmt: skip
            value = found[name]
            if name == "longest_context" and value is None:
                continue
            if _READ.count(value, name, 1) > most:
                raise _READ.wrong(name, f"at most {most:,}", value)
        return cls(**found)


def sizes_told(provenance: Mapping[str, Any]) -> ModelSizes | None:
    """The record in a provenance, checked; None where there is none. Raises ProfileError."""
    return ModelSizes.from_json(provenance[KEY]) if KEY in provenance else None


USUAL_CONTEXT = 32768
"""Tokens of a prompt in figures, unless a context is named or the model has a shorter one."""


def context_for(provenance: Mapping[str, Any], asked: int | None) -> int:
    """The context that is asked for, or the usual one as far as the model has it.

    Raises UsageError for one that the model does not have, ProfileError for a damaged record.
    """
    sizes = sizes_told(provenance)
    longest = None if sizes is None else sizes.longest_context
    if asked is None:
        return min(USUAL_CONTEXT, longest or USUAL_CONTEXT)
    if longest is not None and asked > longest:
        raise UsageError(
            f"--context {asked}: this model's longest context has {longest:,} tokens: give "
            f"--context {longest} or less"
        )
    return asked
