"""RTP-LLM (github.com/alibaba/rtp-llm, cuda_headwise_impl): `headwise_config` in a config.json.

0 or 1 for every query head, 1 for full attention, and windows for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hkvprof.heads import HeadGrid
from hkvprof.profile.bounds import require
from hkvprof.profile.exchange import (
    HALF,
    Format,
    HeadScores,
    Parcel,
    full_or_window,
    head_ranks,
    parcel,
)
from hkvprof.profile.formats.checks import (
    expect_keys,
    read_json,
    refuse_budget,
    to_json,
    whole_number,
)
from hkvprof.profile.record import Profile

KEY = "headwise_config"
FILE = f"{KEY}.json"
SINKS, WINDOW, LONG = 4, 8192, 16384
"""RTP-LLM's own defaults: first tokens, last tokens, and the prompts from which they count."""


def _write(profile: Profile) -> Parcel:
    full = (head_ranks(profile) >= HALF).astype(int)
    pattern: dict[str, Any] = {
        "sink_token_num": SINKS,
        "swa_token_num": WINDOW,
        "seqlen_threshold": LONG,
    }
    rows = np.repeat(full, profile.grid.group, axis=1).tolist()
    pattern |= {str(layer): row for layer, row in enumerate(rows)}
    return parcel(
        {FILE: to_json({KEY: pattern})},
        "scores, curves and shares: 1 for the half of the KV heads that lose most when pruned, for "
        "all of their query heads alike",
        f"windows: a profile measures none, and the file has RTP-LLM's {SINKS} first and "
        f"{WINDOW:,} last tokens, for prompts from {LONG:,} tokens on",
        f"its place: copy the key {KEY} into the model's config.json",
        "the cache: RTP-LLM skips attention in prefill by it, and frees no memory",
    )


def _read(files: Mapping[str, bytes], grid: HeadGrid, budget: float | None) -> HeadScores:
    refuse_budget(budget, "rtp")
    config = read_json(files[FILE], "the configuration")
    require(
        isinstance(config, dict) and isinstance(config.get(KEY), dict),
        f"expected an object with the key {KEY}, as in the config.json of a model",
    )
    pattern = config[KEY]
    layers = {key: value for key, value in pattern.items() if key.isdecimal()}
    expect_keys(layers, [str(layer) for layer in range(grid.layers)], f"{grid.layers} layers")
    heads = np.array([_flags(layers[str(i)], i, grid.query_heads) for i in range(grid.layers)])
    heads = heads.reshape(grid.layers, grid.kv_heads, grid.group)
    full = np.any(heads, axis=-1)
    sinks, window = (
        whole_number(pattern.get(name, usual), f"{KEY}: {name}", low, most)
        for name, usual, low, most in (
            ("sink_token_num", SINKS, 0, 4096), ("swa_token_num", WINDOW, 1, 65536),
        )
    )  # fmt: skip
    mixed = int((full != np.all(heads, axis=-1)).sum())
    long = whole_number(pattern.get("seqlen_threshold", LONG), f"{KEY}: seqlen_threshold", 1, 2**31)
    said = [f"seqlen_threshold: shorter prompts stay whole with `apply(..., min_tokens={long})`"]
    if mixed:
        said.append(f"query heads: {mixed} KV heads serve both kinds, and keep everything")
    return full_or_window(np.asarray(full), sinks, window, *said)


def _flags(row: Any, layer: int, count: int) -> list[bool]:
    sound = isinstance(row, list) and all(type(one) is int and one in (0, 1) for one in row)
    require(sound, f"layer {layer} should be a list of 0 (window) and 1 (full attention)")
    require(len(row) == count, f"layer {layer} has {len(row)} heads, the model {count} query heads")
    return [bool(one) for one in row]


RTP = Format("rtp", "RTP-LLM", (FILE,), _write, _read)
