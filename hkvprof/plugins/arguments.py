"""The `--model_args` of the plug-ins: what is known, what goes where. No torch, no harness."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hkvprof.errors import UsageError

MIN_TOKENS = 64
"""Shorter prompts stay dense in evaluations; `hkvprof.runtime.apply` has a default for speed."""

REQUIRED = ("pretrained", "profile")
LOADING = ("dtype", "device", "device_map")
RUNTIME = (
    "budget",
    "min_tokens",
    "decode_compression",
    "compress_every",
    "host_dtype",
    "smoothing",
    "retrieve_every",
)
_WHOLE = ("min_tokens", "compress_every", "retrieve_every")


@dataclass(frozen=True)
class Arguments:
    """`--model_args`, sorted by who takes them.

    `loading` is for `hkvprof.load_model`, `runtime` for `hkvprof.runtime.apply`, `harness` for the
    harness's own model class.
    """

    pretrained: str
    profile: Any
    loading: dict[str, Any]
    runtime: dict[str, Any]
    harness: dict[str, Any]
    batch_size: int

    @classmethod
    def read(cls, given: Mapping[str, Any], harness: Collection[str] = ()) -> Arguments:
        """Sort what a harness passes on; None counts as not given.

        `harness` names what the harness's model class takes. Raises UsageError naming arguments
        that are unknown, missing or of the wrong kind.
        """
        given = {name: value for name, value in given.items() if value is not None}
        _refuse_unknown(given, (*REQUIRED, "batch_size", *RUNTIME, *LOADING, *harness))
        missing = [name for name in REQUIRED if name not in given]
        if missing:
            raise UsageError(
                f"--model hkvprof needs {' and '.join(missing)}: expected --model_args "
                "pretrained=<alias, hub id or folder>,profile=<file>,budget=0.1"
            )
        runtime = _taken(given, RUNTIME)
        for name in _WHOLE:
            if name in runtime and type(runtime[name]) is not int:
                raise UsageError(f"{name} must be a whole number, found {runtime[name]!r}")
        return cls(
            pretrained=str(given["pretrained"]),
            profile=given["profile"],
            loading=_taken(given, LOADING),
            runtime={"min_tokens": MIN_TOKENS, **runtime},
            harness=_taken(given, harness),
            batch_size=_batch_size(given.get("batch_size", 1)),
        )


def refuse_processes() -> None:
    """Raise UsageError under a launcher of several processes."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise UsageError(
            f"--model hkvprof runs in one process, found WORLD_SIZE={count}: start it without "
            "accelerate or torchrun; device_map=auto spreads a model over several devices"
        )


def _taken(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UsageError(
                f"--model hkvprof knows no argument {name!r}: expected {', '.join(known)}.{hint}"
            )


def _batch_size(value: Any) -> int:
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UsageError(
        f"batch_size must be a number of at least 1, found {value!r}: automatic sizes are measured "
        "on dense passes, which say nothing about compressed ones"
    )
