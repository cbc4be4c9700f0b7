"""What `apply` takes, and what compression adds to a prefill, in time and in bytes at the peak.

    python -m tools.studies.prefill_cost [--tokens 16384] [--budget 0.1] [--types profile]

SmolLM2 reads random tokens (positions beyond its 8k are as good as any for timing). The share is
that of compression within the same prefill, by the receipt's own clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch

import hkvprof
from hkvprof.bench.methods import COMPRESSING, variants
from hkvprof.runtime import apply


def main() -> None:
    """Prefill and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--budget", default="0.1")
    parser.add_argument("--types", default="profile", choices=list(COMPRESSING))
    options = parser.parse_args()
    model, _ = hkvprof.load_model("smollm2", dtype="bfloat16")
    path = "profiles/smollm2.hkv.safetensors"
    waits = []
    for _ in range(9):
        began = time.perf_counter()
        handle = apply(model, path, budget=options.budget)
        waits.append(1000 * (time.perf_counter() - began))
        handle.detach()
    profile = hkvprof.load_profile(path)
    profile = variants(profile, [options.types])[COMPRESSING[options.types]]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40000, (1, options.tokens), generator=generator)
    with apply(model, profile, budget=options.budget) as handle, torch.no_grad():
        model(input_ids=ids[:, :512], logits_to_keep=1)  # warm-up
        began = time.perf_counter()
        model(input_ids=ids, logits_to_keep=1)
        seconds = time.perf_counter() - began
        receipt = handle.receipt()
    one = receipt.dense_bytes // len(receipt.layers)
    sys.stdout.write(
        f"apply(model, path): first {waits[0]:.1f} ms, median {median(waits):.1f} ms, "
        f"{len(receipt.layers)} layers\n"
        f"{options.types}, {options.tokens} tokens, bfloat16, {torch.get_num_threads()} threads: "
        f"prefill {seconds:.1f} s, of which compression {receipt.compression_seconds:.2f} s "
        f"({receipt.compression_seconds / seconds:.2%})\n{receipt}\n"
        f"peak {receipt.peak_bytes / 2**20:.2f} MiB; resident + one dense layer "
        f"{(receipt.resident_bytes + one) / 2**20:.2f} MiB\n"
    )


if __name__ == "__main__":
    main()
