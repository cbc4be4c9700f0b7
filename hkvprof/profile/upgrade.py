"""Profiles of older schema versions, brought to what today's hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import Rules
from hkvprof.profile.bounds import MOST_TOKENS, require

_OLD_INDEX = (
    "its index was quantised in a way that this hkvprof no longer reads (schema version 1): "
    "make the profile again with `hkvprof calibrate`"
)


def upgrade(metadata: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
    """Change a file's content in place. Raises ProfileError, or KeyError and TypeError if damaged.

    Version 1 quantised its index otherwise; versions 1 and 2 have one curve for prompts of all
    lengths and do not say how to plan with it: as is done today. Up to version 3 all residents are
    in the model's own dtype, scores are the window's, and reads from the host had a price
    (`planning.transfer_weight`) in place of a budget: it means nothing any more.
    """
    schema = metadata["schema"]
    if schema < 4:
        for name in ("resident_bits", "score"):
            later = [entry for entry in metadata["strategies"] if name in entry]
            require(not later, f"{name} in a file of schema version {schema}, which has none")
        known = not any(key.startswith("queries.") for key in tensors)
        require(known, f"queries.* tensors in a file of schema version {schema}, which has none")
        if schema == 3:
            weight = metadata["planning"].pop("transfer_weight")
            require(0 <= weight <= 1e9, f"planning: transfer_weight {weight} is not in [0, 1e9]")
    if schema < 2:
        require(not any(key.startswith("index.") for key in tensors), _OLD_INDEX)
    if schema < 3:
        for name, found in (("lengths", tensors), ("planning", metadata)):
            require(name not in found, f"{name} in a file of schema version {schema}")
        require(
            not any(key.startswith("statistics.") for key in tensors),
            f"statistics.* tensors in a file of schema version {schema}, which has none",
        )
        metadata["planning"] = asdict(Rules())
        length = mean_tokens(metadata["provenance"]) or 1
        tensors["lengths"] = np.array([length], dtype=np.int64)
        for name in ("loss", "output_error"):
            tensors[name] = tensors[name][None]


def mean_tokens(provenance: Mapping[str, Any]) -> int | None:
    """Mean prompt length in a provenance, which anyone may have written; None if it has none."""
    return tokens_told(provenance, "mean")


def tokens_told(provenance: Mapping[str, Any], name: str) -> int | None:
    """The `min`, `mean` or `max` of prompt lengths in a provenance; None if it has none."""
    tokens = provenance.get("tokens")
    told = tokens.get(name) if isinstance(tokens, Mapping) else None
    if isinstance(told, bool) or not isinstance(told, int | float):
        return None
    return math.ceil(told) if 1 <= told <= MOST_TOKENS else None
