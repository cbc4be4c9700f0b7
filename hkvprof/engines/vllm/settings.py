"""What a user writes into `additional_config["hkvprof"]`, read strictly. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.profile.budgets import Budget

KEY = "hkvprof"
EXAMPLE = '{"hkvprof": {"profile": "model.hkv.safetensors", "budget": 0.2}}'


@dataclass(frozen=True)
class EngineSettings:
    """The profile's path and the budget; with `untested` also untested releases of vLLM run."""

    profile: str
    budget: float | str
    untested: bool = False

    @classmethod
    def parse(cls, value: object) -> EngineSettings:
        """Read the entry. Raises UsageError for unknown or missing keys and wrong kinds."""
        if not isinstance(value, Mapping):
            raise UsageError(f"{KEY} must be an object, found {value!r}: such as {EXAMPLE}")
        known = {field.name for field in fields(cls)}
        unknown, missing = value.keys() - known, {"profile", "budget"} - value.keys()
        if unknown or missing:
            found = [f"unknown {sorted(map(str, unknown))}"] if unknown else []
            found += [f"missing {sorted(missing)}"] if missing else []
            raise UsageError(f"{KEY}: {', '.join(found)}; expected such as {EXAMPLE}")
        made = cls(**value)
        if not isinstance(made.profile, str) or not made.profile:
            raise UsageError(f"{KEY}.profile must be a path, found {made.profile!r}")
        if not isinstance(made.untested, bool):
            raise UsageError(f"{KEY}.untested must be true or false, found {made.untested!r}")
        if Budget.parse(made.budget).share is None:
            raise UsageError(
                f"{KEY}.budget must be a share of dense bytes such as 0.2 or '20%', found "
                f"{made.budget!r}: the engine plans for requests of every length"
            )
        return made


def settings_of(additional: Any) -> EngineSettings | None:
    """The settings in vLLM's `additional_config`; None where it has none. Raises UsageError."""
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    return EngineSettings.parse(additional[KEY])
