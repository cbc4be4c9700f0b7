"""Indexes of dynamic heads against each other at equal all-in bytes, on real keys.

    python -m tools.studies.study_retrieval --model tinyvl [--samples 24] [--budgets 0.1,0.05]
    python -m tools.studies.study_retrieval --model smollm2 --samples 8

Every head is dynamic with the same index and share, and the product's own runtime decodes: the
dense model's reply and its reply to a later question are forced token by token. Calibration split
only. Prints a markdown table (docs/retrieval.md quotes it) and, with --json, writes the figures:

- KL: mean KL(full || compressed) of the next-token distribution, in nats; top 1: share of steps
  that agree on the likeliest token;
- resident: all-in share of the dense bytes after the prompt; moved: bytes fetched from the host per
  step as a share of the dense bytes; hits: of the hot buffers;
- retrieval, decode: median ms per step of scoring + selecting + fetching, and of the whole step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration.continuation import opening_of_turn
from hkvprof.errors import BudgetError
from hkvprof.evaluate import longtext
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.heads import HeadType, Strategy
from hkvprof.models.calls import with_cache
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply, kernels
from hkvprof.samples.read import Sample, open_images
from hkvprof.testbed import generator

REPLY_TOKENS = 24
FIRST_SEED = 9000
TINYVL_TASKS = ("ocr", "list", "find", "diff", "kv", "count")
LONGTEXT_TASKS = ("needle_words", "needle_motto", "passkey", "continuation")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: a strategy for all heads, and runtime options."""

    text: str
    strategy: Strategy | None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _digest(index: str, chunk: int) -> Variant:
    strategy = Strategy(HeadType.DYNAMIC, index=index, chunk=chunk)
    return Variant(f"{index}, chunks of {chunk}", strategy, {"smoothing": 0.0})


def _projected(bits: int, text: str = "", rerank: int = 0, **options: Any) -> Variant:
    strategy = Strategy(HeadType.DYNAMIC, index="projected", bits=bits, rerank=rerank)
    return Variant(f"projected, {bits} bits{text}", strategy, {"smoothing": 0.0, **options})


VARIANTS = (
    *(_digest(index, chunk) for index in ("mean", "minmax") for chunk in (4, 16, 32)),
    *(_projected(bits) for bits in (16, 32, 64)),
    *(_projected(bits, ", rerank 64", 64) for bits in (16, 32, 64)),
    *(_projected(32, f", rerank {count}", count) for count in (16, 32, 128)),
    _projected(32, ", smoothing 0.5", smoothing=0.5),
    _projected(32, ", smoothing 0.7", smoothing=0.7),
    _projected(32, ", host int8", host_dtype="int8"),
    Variant("static, pool 7", Strategy(HeadType.STATIC, pool=7)),
    *(
        Variant(f"the profile, smoothing {smoothing:g}", None, {"smoothing": smoothing})
        for smoothing in (0.0, 0.3, 0.5, 0.7)
    ),
    Variant("the profile, smoothing 0, host int8", None, {"smoothing": 0.0, "host_dtype": "int8"}),
)


@dataclasses.dataclass(frozen=True)
class Script:
    """What is fed after the prompt, in passes, and the dense model's log-probabilities."""

    prompt: Prefill
    passes: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def main() -> None:
    """Run all variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinyvl", choices=["tinyvl", "smollm2"])
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2500, help="length of long-text prompts")
    parser.add_argument("--budgets", default="0.2,0.1,0.05,0.03")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    budgets = [float(text) for text in options.budgets.split(",")]
    model, processor = hkvprof.load_model(options.model, dtype="bfloat16")
    profile = hkvprof.load_profile(f"profiles/{options.model}.hkv.safetensors")
    samples = _samples(options.model, processor, options.samples, options.tokens)
    scripts = [_script(model, processor, sample) for sample in samples]
    rows = []
    for budget in budgets:
        for variant in VARIANTS:
            if options.only in variant.text:
                try:
                    rows.append(_measure(model, profile, variant, budget, scripts))
                except BudgetError:
                    rows.append({"budget": budget, "index": variant.text, "kl": None})
                sys.stderr.write(f"{rows[-1]}\n")
    tokens = [script.prompt.tokens for script in scripts]
    regime = (
        f"{options.model}, bfloat16, batch 1, {len(scripts)} prompts of {min(tokens)} to "
        f"{max(tokens)} tokens, {torch.get_num_threads()} threads, {kernels.status()}"
    )
    _print(regime, rows)
    if options.json:
        options.json.write_text(json.dumps({"regime": regime, "rows": rows}, indent=1))


def _samples(name: str, processor: Any, count: int, tokens: int) -> list[Sample]:
    if name == "tinyvl":
        return [
            generator.make_sample(
                TINYVL_TASKS[i % len(TINYVL_TASKS)], FIRST_SEED + i,
                images=(12, 16)[i % 2], split="calibration", followups=1,
            )
            for i in range(count)
        ]  # fmt: skip
    return [
        longtext.make_sample(
            LONGTEXT_TASKS[i % len(LONGTEXT_TASKS)], FIRST_SEED + i, tokens, "calibration",
            followups=1, count_tokens=lambda text: len(processor.encode_text(text)),
        )
        for i in range(count)
    ]  # fmt: skip


@torch.no_grad()
def _script(model: Any, processor: Any, sample: Sample) -> Script:
    """The dense model's own replies to the question and to the follow-up."""
    opened = dataclasses.replace(sample, messages=tuple(open_images(sample)))
    encoded = processor.encode([opened.messages])
    prompt = capture(model, encoded)
    cache = prompt.dense_cache()
    logits = prompt.logits[None]
    passes: list[Tensor] = []
    expected: list[Tensor] = []
    for turn in range(2):
        for _ in range(REPLY_TOKENS):
            token = logits[:, -1:].argmax(-1)
            passes.append(token)
            logits = model(input_ids=token, **with_cache(model, cache)).logits
            expected.append(logits[0, -1].float().log_softmax(-1))
        if turn == 0 and sample.followups:
            # The reply has been fed token by token: only what comes after it is missing.
            ids = torch.tensor([opening_of_turn(processor, opened, [""])])
            passes.append(ids)
            logits = model(input_ids=ids, **with_cache(model, cache)).logits
            expected.append(logits[0, -1].float().log_softmax(-1))
        elif turn == 0:
            break
    return Script(prompt, tuple(passes), tuple(expected))


def _profile(profile: Profile, strategy: Strategy | None, budget: float) -> Profile:
    """The same share and strategy for every head; the index constants stay the profile's."""
    if strategy is None:
        return profile
    shape = profile.strategy.shape
    return dataclasses.replace(
        profile,
        recipe="uniform",
        default_budget=budget,
        strategies=(strategy,),
        strategy=np.zeros(shape, dtype=np.uint8),
        budget=np.full(shape, budget, dtype=np.float32),
        loss=profile.loss[:, :1].copy(),
        output_error=profile.output_error[:, :1].copy(),
    )


@torch.no_grad()
def _measure(
    model: Any, profile: Profile, variant: Variant, budget: float, scripts: list[Script]
) -> dict[str, Any]:
    steps: list[tuple[float, bool, float]] = []
    shares, moved, hits, retrieval = [], [], [], []
    with apply(
        model, _profile(profile, variant.strategy, budget), budget=budget, **variant.options
    ) as handle:
        for script in scripts:
            cache = handle.new_cache()
            script.prompt.fill(cache)
            start = cache.receipt()
            shares.append(start.resident_share)
            steps += _replay(model, cache, script)
            end = cache.receipt()
            moved.append(end.bytes_moved / max(end.steps, 1) / end.dense_bytes)
            retrieval.append(1000 * end.retrieval_seconds / max(end.steps, 1))
            if end.hit_rate is not None:
                hits.append(end.hit_rate)
    return {
        "budget": budget,
        "index": variant.text,
        "kl": fmean(kl for kl, _, _ in steps),
        "top1": fmean(same for _, same, _ in steps),
        "resident_share": fmean(shares),
        "moved_share": fmean(moved),
        "hit_rate": fmean(hits) if hits else None,
        "retrieval_ms": median(retrieval),
        "decode_ms": median(ms for _, _, ms in steps),
    }


def _replay(model: Any, cache: Any, script: Script) -> Iterator[tuple[float, bool, float]]:
    """KL, agreement and ms of every single-token pass."""
    for ids, expected in zip(script.passes, script.expected, strict=True):
        began = time.perf_counter()
        logits = (
            model(input_ids=ids, **with_cache(model, cache)).logits[0, -1].float().log_softmax(-1)
        )
        ms = 1000 * (time.perf_counter() - began)
        if ids.shape[1] == 1:
            kl = float((expected.exp() * (expected - logits)).sum())
            yield kl, bool(logits.argmax() == expected.argmax()), ms


def _print(regime: str, rows: list[dict[str, Any]]) -> None:
    out = sys.stdout
    out.write(f"{regime}\n\n| budget | index | KL | top 1 | resident | moved | hits | retrieval ms "
              "| decode ms |\n|---|---|---|---|---|---|---|---|---|\n")  # fmt: skip
    for row in rows:
        if row["kl"] is None:
            out.write(f"| {row['budget']:.0%} | {row['index']} | does not fit ||||||\n")
            continue
        hits = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"
        out.write(
            f"| {row['budget']:.0%} | {row['index']} | {row['kl']:.4f} | {row['top1']:.3f} | "
            f"{row['resident_share']:.2%} | {row['moved_share']:.2%} | {hits} | "
            f"{row['retrieval_ms']:.2f} | {row['decode_ms']:.1f} |\n"
        )


if __name__ == "__main__":
    main()
