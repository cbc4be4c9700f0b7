"""Does the resident share stay at the budget however much is generated?

    python -m tools.studies.long_generation [--new-tokens 8192] [--budget 0.1] [--images 16]

tinyvl answers one question without end (no end token). At every 64th token the receipt is compared
with the summed tensors of the cache, to the byte. Prints the all-in share over time.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import hkvprof
from hkvprof.models.calls import with_cache
from hkvprof.runtime import apply, measure_storage
from hkvprof.runtime.options import COMPRESS_EVERY
from hkvprof.testbed.generator import make_sample

LOOK_EVERY = 64


class Watch(StoppingCriteria):
    """Notes (tokens, share, tail) at every LOOK_EVERYth token; stops nothing."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.seen: list[tuple[int, float]] = []
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called by generate() after each token."""
        self.calls += 1
        if self.calls % LOOK_EVERY == 0:
            receipt = self.cache.receipt()
            measured = measure_storage(self.cache)
            assert measured == (receipt.resident_bytes, receipt.host_bytes), measured
            self.seen.append((self.cache.get_seq_length(), receipt.resident_share))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def main() -> None:
    """Generate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new-tokens", type=int, default=8192)
    parser.add_argument("--budget", default="0.1")
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    model, processor = hkvprof.load_model("tinyvl")
    sample = make_sample("list", 1, images=options.images, split="calibration")
    encoded = processor.encode([sample.messages])
    out = sys.stdout
    out.write(f"tinyvl, {model.dtype}, prompt {encoded.tokens} tokens, budget {options.budget}\n")
    for every in (COMPRESS_EVERY, 0):
        with apply(
            model,
            "profiles/tinyvl.hkv.safetensors",
            budget=options.budget,
            compress_every=every,
        ) as handle:
            cache = handle.new_cache()
            watch = Watch(cache)
            model.generate(
                **encoded.to(model.device, model.dtype),
                **with_cache(model, cache),
                max_new_tokens=options.new_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
            marks = [watch.seen[i * (len(watch.seen) - 1) // 8] for i in range(9)]
            shares = ", ".join(f"{tokens}: {share:.1%}" for tokens, share in marks)
            out.write(f"compress_every={every}: {shares}\n  {handle.receipt()}\n")


if __name__ == "__main__":
    main()
