"""Does a process that generates all day stay as it was after an hour?

    python -m tools.studies.soak [--calls 2000] [--seed 0] [--fresh 12] [--json out/soak.json]
    python -m tools.studies.soak --only 417

Calls of generate() with a profile applied: the embedded tinyvl (1 to 12 images) and a small random
Llama in turn, 1 to 3 rows of different lengths, several budgets, host types and lengths of the
answer; every call applies the profile anew, and one in three generates twice on its handle. A
budget too small for its prompt is refused in the middle of a call: that is part of the day. After a
warm-up, resident memory and the number of live tensors must not grow; --fresh of the calls are
repeated, each in a process of its own, and must say the same. One thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import BudgetError
from hkvprof.runtime import CompressedCache, Handle, apply
from hkvprof.testbed.generator import make_sample

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "profiles" / "tinyvl.hkv.safetensors"
BUDGETS = (0.08, 0.1, 0.2, 0.5, 1.0)
TASKS = ("ocr", "list", "find", "kv")
LOOK_EVERY = 25
WARM_UP = 0.2
"""Share of the calls before memory has to be flat."""
MOST_GROWTH = 16 * 2**20
"""Bytes: the allocator's pages come and go by some MiB."""


@dataclass
class State:
    """Resident bytes, live tensors, live caches and handles after a call."""

    call: int
    resident: int
    tensors: int
    caches: int
    handles: int


@dataclass
class Desk:
    """Models with their profiles by name, and tinyvl's processor."""

    models: dict[str, tuple[Any, Any]]
    processor: Any

    @classmethod
    def make(cls) -> Desk:
        """Load and build."""
        tiny, processor = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
        )  # fmt: skip
        llama = LlamaForCausalLM(config).eval()
        types = torch.arange(6).reshape(3, 2).numpy() % 2
        profile = uniform_profile(llama, types, index="mean", chunk=16)
        loaded = hkvprof.load_profile(PROFILE)
        return cls({"tinyvl": (tiny, loaded), "llama": (llama, profile)}, processor)

    def call(self, number: int, seed: int) -> list[list[int]] | str:
        """The tokens that call `number` generates, or why none: a function of its arguments."""
        draw = random.Random(f"soak:{seed}:{number}")
        name = ("tinyvl", "llama")[number % 2]
        budget, host = draw.choice(BUDGETS), draw.choice(("same", "int8"))
        again = draw.random() < 1 / 3
        inputs = self._tiny(draw) if name == "tinyvl" else self._text(draw)
        steps = draw.randint(1, 16)
        handle = self._handle(name, budget, host)
        try:
            model = self.models[name][0]
            out = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
            if again:  # a second request on the same handle
                out = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
            handle.receipt()
        except BudgetError as error:
            return str(error)
        finally:
            handle.detach()
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    def _handle(self, name: str, budget: float, host: str) -> Handle:
        model, profile = self.models[name]
        return apply(model, profile, budget=budget, min_tokens=64, host_dtype=host)

    def _tiny(self, draw: random.Random) -> dict[str, Any]:
        rows = draw.choice((1, 1, 2, 3))
        samples = [
            make_sample(draw.choice(TASKS), draw.randrange(10_000), images=draw.randint(1, 12))
            for _ in range(rows)
        ]
        model = self.models["tinyvl"][0]
        encoded = self.processor.encode([sample.messages for sample in samples])
        return dict(encoded.to(model.device, model.dtype))

    def _text(self, draw: random.Random) -> dict[str, Any]:
        lengths = [draw.randint(20, 600) for _ in range(draw.choice((1, 1, 2, 3)))]
        longest = max(lengths)
        ids = torch.tensor([[draw.randrange(3, 64) for _ in range(longest)] for _ in lengths])
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            ids[row, : longest - length] = mask[row, : longest - length] = 0
        return {"input_ids": ids, "attention_mask": mask}


def look(call: int) -> State:
    """Collect garbage and count what is left."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    alive = gc.get_objects()
    return State(
        call,
        pages * resource.getpagesize(),
        *(sum(issubclass(type(one), kind) for one in alive)
          for kind in (torch.Tensor, CompressedCache, Handle)),
    )  # fmt: skip


def soak(calls: int, seed: int, desk: Desk | None = None) -> tuple[list[State], list[Any]]:
    """All calls; states at every LOOK_EVERYth, and what each call said."""
    desk, states, said = desk or Desk.make(), [], []
    start = time.monotonic()
    for number in range(calls):
        said.append(desk.call(number, seed))
        if (number + 1) % LOOK_EVERY == 0 or number + 1 == calls:
            states.append(look(number + 1))
            now, seconds = states[-1], time.monotonic() - start
            left = seconds / (number + 1) * (calls - number - 1) / 60
            tell(
                f"{number + 1} of {calls} calls, resident {now.resident / 2**20:.1f} MiB, "
                f"{now.tensors} tensors, {now.caches} caches, {now.handles} handles, "
                f"{left:.0f} min left"
            )
    return states, said


def growth(states: list[State]) -> dict[str, int]:
    """Between the first and the last third of the states after the warm-up, by median."""
    flat = [s for s in states if s.call > WARM_UP * states[-1].call]
    third = max(len(flat) // 3, 1)
    return {
        name: int(
            statistics.median(getattr(s, name) for s in flat[-third:])
            - statistics.median(getattr(s, name) for s in flat[:third])
        )
        for name in ("resident", "tensors", "caches", "handles")
    }


def fresh(number: int, seed: int) -> Any:
    """What the call says in a process of its own."""
    command = [sys.executable, __file__, "--only", str(number), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def tell(line: str) -> None:
    """Progress, at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Parse, soak, compare, print; 1 if memory grew or an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", type=int, default=12, help="calls to repeat in fresh processes")
    parser.add_argument("--only", type=int, help="print what this call says, and nothing else")
    parser.add_argument("--json", type=Path, help="write all states and the verdict")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only is not None:
        sys.stdout.write(f"{json.dumps(Desk.make().call(given.only, given.seed))}\n")
        return 0
    states, said = soak(given.calls, given.seed)
    picked = sorted(random.Random(given.seed).sample(range(given.calls), given.fresh))
    differing = [number for number in picked if fresh(number, given.seed) != said[number]]
    grown = growth(states)
    found = {
        "calls": given.calls,
        "refused_budgets": sum(isinstance(answer, str) for answer in said),
        "grown_after_warm_up": grown,
        "fresh_processes": {"calls": picked, "differing": differing},
        "states": [vars(state) for state in states],
    }
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(
        f"{given.calls} calls, {found['refused_budgets']} of them refused; after the "
        f"warm-up: {grown['resident'] / 2**20:+.1f} MiB resident, "
        f"{grown['tensors']:+d} tensors, {grown['caches']:+d} caches, {grown['handles']:+d} "
        f"handles; {len(picked) - len(differing)} of {len(picked)} calls say the same in a fresh "
        "process\n"
    )
    leaked = any(grown[name] for name in ("tensors", "caches", "handles"))
    return int(leaked or grown["resident"] > MOST_GROWTH or bool(differing))


if __name__ == "__main__":
    sys.exit(main())
