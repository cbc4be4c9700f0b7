"""How far above its budget is a request between compressions, and what does it lose?

    python -m tools.studies.tail_overshoot [--steps 160] [--scenes 4] [--budgets 0.05 0.1]

tinyvl is forced through what the dense model generates without end, in four turns where it says so.
After every token the receipt is looked at: the largest all-in share, and the largest excess in
tokens per head. KL is that of the dense model's next token to the compressed
one's, a mean over all tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import hkvprof
import hkvprof.runtime
from hkvprof.models.calls import with_cache
from hkvprof.testbed.generator import make_sample

CASES = {"300 tokens": (13, 1), "600 tokens": (27, 1), "four turns": (27, 4)}
"""Images, turns."""
TURN = "and what about the other one of them?"


def passes(model: Any, cache: Any, inputs: dict[str, Tensor], later: list[Tensor]) -> Iterator[Any]:
    """Logits of the last position after the prompt and after every later pass."""
    yield model(**inputs, **with_cache(model, cache)).logits[0, -1]
    for ids in later:
        yield model(input_ids=ids, **with_cache(model, cache)).logits[0, -1]


def script(model: Any, processor: Any, inputs: dict[str, Tensor], turns: int, steps: int) -> Any:
    """Dense logits, and the tokens to force: the dense model's own, with turns between."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    out = model(**inputs, **with_cache(model, cache)).logits[0, -1]
    logits, later = [out], []
    question = processor.tokenizer(TURN, return_tensors="pt")["input_ids"].to(model.device)
    for turn in range(turns):
        for step in range(steps // turns):
            asks = turn > 0 and step == 0
            later.append(question if asks else logits[-1].argmax().view(1, 1))
            logits.append(model(input_ids=later[-1], **with_cache(model, cache)).logits[0, -1])
    return logits, later


def follow(
    model: Any, profile: str, budget: float, inputs: Any, expected: Any, later: Any
) -> tuple[float, float, float, int, float]:
    """Largest share over the budget, most tokens over, KL, compressions, seconds."""
    shares, over, distances = [0.0], [0.0], []
    began = time.perf_counter()
    with hkvprof.runtime.apply(model, profile, budget=budget) as handle:
        cache = handle.new_cache()
        for number, found in enumerate(passes(model, cache, inputs, later)):
            if number == 0 or later[number - 1].shape[1] == 1:  # a turn is excepted while it runs
                receipt = cache.receipt()
                shares.append(receipt.resident_share / budget)
                worth = budget * cache.get_seq_length()
                over.append((receipt.resident_share / budget - 1) * worth)
            p, q = expected[number].log_softmax(-1), found.log_softmax(-1)
            distances.append(float((p.exp() * (p - q)).sum()))
        count = cache.receipt().layers[0].compressions
    return max(shares), max(over), fmean(distances), count, time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--profile", default="profiles/tinyvl.hkv.safetensors")
    options = parser.parse_args()
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    out = sys.stdout
    out.write("| prompt | budget | worst share | tokens over | KL | compressions | s |\n")
    out.write("|---|---|---|---|---|---|---|\n")
    for name, (images, turns) in CASES.items():
        rows: dict[float, list[Any]] = {budget: [] for budget in options.budgets}
        tokens = 0
        for scene in range(options.scenes):
            sample = make_sample("list", scene, images=images, split="heldout")
            encoded = processor.encode([sample.messages])
            inputs, tokens = encoded.to(model.device, model.dtype), encoded.tokens
            expected, later = script(model, processor, inputs, turns, options.steps)
            for budget in options.budgets:
                holder = getattr(model.model, "rope_deltas", None)
                rows[budget].append(follow(model, options.profile, budget, inputs, expected, later))
                model.model.rope_deltas = holder
        for budget, found in rows.items():
            share, over = (max(row[i] for row in found) for i in (0, 1))
            kl, count, seconds = (fmean(row[i] for row in found) for i in (2, 3, 4))
            out.write(
                f"| {name} ({tokens}) | {budget:.0%} | {share * budget:.1%} | {over:.1f} "
                f"| {kl:.4f} | {count:.0f} | {seconds:.1f} |\n"
            )
        out.flush()


if __name__ == "__main__":
    main()
