"""What deciding costs a request: looking a plan up, or classifying its heads as HybridKV does.

    python -m tools.studies.request_cost [--profile PROFILE] [--tokens 2048,8192,32768]

Both sides decide types and budgets of all heads of the profile's model at the end of a prompt, one
after the other in one run, one thread; what follows (scoring tokens, packing) is the same for both
and not counted. "First" plans a prompt length that no request had before, "again" one that a
request had. Online, the text-centric sparsity of every query head is formed over at most 64 text
rows and all keys (random ones, float32), then heads are typed and given budgets: the code of the
baseline `hybridkv`. Prints a markdown table of medians; docs/evaluation.md quotes it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration.decide import allocate_by_sparsity, types_by_sparsity
from hkvprof.evaluate.baselines.hybridkv import KAPPA, KEEP, THETA
from hkvprof.profile.budgets import Budget
from hkvprof.profile.costs import token_floor
from hkvprof.profile.record import Profile
from hkvprof.runtime.options import Options
from hkvprof.runtime.plan import Planner
from hkvprof.selection.sparsity import sample_text_rows, text_sparsity

SHARE, ITEMSIZE = 0.1, 2
SHIPPED = Path("profiles/smollm2.hkv.safetensors")


def main() -> None:
    """Time both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path, default=SHIPPED)
    parser.add_argument("--tokens", default="2048,8192,32768")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = hkvprof.load_profile(options.profile)
    grid = profile.grid
    sys.stdout.write(
        f"{grid.layers} layers, {grid.query_heads} query heads, {grid.kv_heads} KV heads of width "
        f"{grid.head_dim}; budget {SHARE:.0%}, ms, medians of {options.repeats}\n\n"
        "| tokens | plan, first | plan, again | classify online | online over first |\n"
        "|---|---|---|---|---|\n"
    )
    for tokens in (int(text) for text in options.tokens.split(",")):
        first, again, online = _times(profile, tokens, options.repeats)
        sys.stdout.write(
            f"| {tokens:,} | {first:.2f} | {again:.4f} | {online:.1f} | {online / first:.0f}x |\n"
        )
        sys.stdout.flush()


def _times(profile: Profile, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Milliseconds: a first plan, one again, online; in turns."""
    grid = profile.grid
    query = torch.randn(grid.query_heads, tokens, grid.head_dim)
    key = torch.randn(grid.kv_heads, tokens, grid.head_dim)
    found: list[tuple[float, float, float]] = []
    for _ in range(repeats + 1):
        planner = Planner(profile, Budget(share=SHARE), Options())

        def plan(planner: Planner = planner) -> None:
            planner.rows([tokens], ITEMSIZE, strict=True)

        found.append((_timed(plan), _timed(plan), _timed(lambda: _online(profile, query, key))))
    first, again, online = (median(column) for column in zip(*found[1:], strict=True))
    return first, again, online


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def _online(profile: Profile, query: Tensor, key: Tensor) -> None:
    """Types and budgets from this prompt's attention; every token counts as text."""
    grid, tokens = profile.grid, key.shape[1]
    at = sample_text_rows(torch.ones(tokens, dtype=torch.bool))
    scaling = grid.head_dim**-0.5
    rows = [text_sparsity(query[:, at], key, at, scaling, (KAPPA,))[0] for _ in range(grid.layers)]
    mean = torch.stack(rows).numpy()
    floor = min(SHARE, token_floor(KEEP.floor_tokens, tokens))
    allocate_by_sparsity(types_by_sparsity(mean, THETA, grid), mean, SHARE, floor, grid)


if __name__ == "__main__":
    main()
