"""`hkvprof bench --engine vllm`: the engine with a profile beside plain vLLM, at equal KV bytes.

Every engine runs in a process of its own. Ratios are what counts: seconds are those of a machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from hkvprof.engines.vllm.crowd import MARK, Crowd, Served
from hkvprof.engines.vllm.script import ReplyScript, Spoken
from hkvprof.errors import UsageError
from hkvprof.lazy import missing_extra
from hkvprof.profile.blocks import plan_blocks
from hkvprof.profile.record import load_profile

BLOCK = 32
"""Tokens of a block: the least that vLLM's kernels for CPUs take."""
SHARED = 0.75
"""Of a prompt, where prefix hits are counted."""


@dataclass(frozen=True)
class EngineSetup:
    """What is measured: `requests` prompts of `context` tokens with replies of `new_tokens`, in
    memory for `pool` of them without hkvprof; overhead is the least of `rounds` turns."""

    model: str
    profile: str
    budgets: tuple[str, ...]
    context: int = 2048
    new_tokens: int = 64
    requests: int = 120
    pool: int = 12
    rounds: int = 4
    dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_gib(self) -> int:
        """Memory that vLLM is to have for the pool, in whole GiB."""
        each = load_profile(self.profile).grid.token_bytes(self.itemsize)
        return 1 + self.pool * (self.context + self.new_tokens + 2 * BLOCK) * each // 2**30

    def groups(self, budget: str | None) -> int:
        """Groups of heads with block tables of their own; without hkvprof all heads share one."""
        if budget is None:
            return 1
        return plan_blocks(load_profile(self.profile), budget, BLOCK, self.itemsize).groups

    def options(self, budget: str | None) -> dict[str, Any]:
        """Of vLLM, for an engine with this budget, or without hkvprof."""
        each = -(-(self.context + self.new_tokens) // BLOCK)
        extra = None if budget is None else {"profile": self.profile, "budget": budget}
        return {
            "model": self.model, "dtype": self.dtype, "block_size": BLOCK, "enforce_eager": True,
            "max_model_len": self.context + self.new_tokens, "skip_tokenizer_init": True,
            "disable_log_stats": True, "enable_prefix_caching": True, "max_num_seqs": 256,
            "num_gpu_blocks_override": self.groups(budget) * each * self.pool + 1,
            "additional_config": {} if extra is None else {"hkvprof": extra},
        }  # fmt: skip


def require_engine() -> None:
    """Raise UsageError where vLLM is not installed. It is not imported: it changes the process."""
    if find_spec("vllm") is None:
        raise missing_extra("vllm", "vllm")


class ServedEngine:
    """An engine in its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def serve(self, crowd: Crowd) -> Served:
        """Have it serve a crowd. Raises UsageError where it ends instead."""
        return Served(**self._ask(crowd))

    def recite(self, script: ReplyScript) -> Spoken:
        """Have it serve one request that follows a script. Raises UsageError as `serve` does."""
        return Spoken(**self._ask(script))

    def _ask(self, told: Crowd | ReplyScript) -> dict[str, Any]:
        self._say({type(told).__name__: asdict(told)})
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                made: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return made
        raise UsageError(
            "vLLM ended instead of serving (what it wrote is above): start it by `vllm serve` "
            "with the same model and profile to see why"
        )

    def _say(self, told: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(told) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its output ends, and `serve` says so


@contextmanager
def contestant(setup: EngineSetup, budget: str | None, **more: Any) -> Iterator[ServedEngine]:
    """Start an engine, with `more` options of vLLM, and end it. Raises as `require_engine`."""
    require_engine()
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": str(setup.kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "hkvprof.engines.vllm.contestant"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        made = ServedEngine(process)
        made._say(setup.options(budget) | more)
        try:
            yield made
        finally:
            process.kill()


def measure(setup: EngineSetup, say: Any) -> dict[str, Any]:
    """All figures, as JSON can hold them. Raises UsageError."""
    rows = []
    for budget in (None, *setup.budgets):
        say(f"{setup.requests} prompts of {setup.context} tokens, {_named(budget)}")
        with contestant(setup, budget) as engine:
            rows.append({"budget": budget, **_row(engine, setup)})
    say("steps at budget 1.0 beside plain vLLM, in turns")
    return {"setup": asdict(setup), "rows": rows, "overhead": overhead(setup)}


def _row(engine: ServedEngine, setup: EngineSetup) -> dict[str, Any]:
    crowd = Crowd(setup.requests, setup.context, setup.new_tokens)
    engine.serve(replace(crowd, requests=1, new_tokens=1, seed=5))
    alone = engine.serve(replace(crowd, requests=2, new_tokens=1, seed=2))
    shared = int(SHARED * setup.context) // BLOCK * BLOCK
    same = replace(crowd, requests=4, new_tokens=1, shared=shared, seed=3)
    engine.serve(replace(same, requests=1, seed=4))
    return {
        "compaction_share": alone.compaction_seconds / alone.cpu_seconds,
        "prefix_hits": engine.serve(same).cached / (same.requests * same.tokens),
        "crowd": asdict(engine.serve(crowd)),
    }


def overhead(setup: EngineSetup) -> float:
    """CPU time per request and step at budget 1.0 over plain vLLM's: the least of some turns, taken
    one after the other of both, of short prompts that decode together."""
    crowd = Crowd(requests=8, tokens=240, new_tokens=setup.new_tokens)
    taken: dict[str | None, list[float]] = {None: [], "1.0": []}
    with contestant(setup, None) as plain, contestant(setup, "1.0") as split:
        for turn in range(setup.rounds + 1):
            for name, engine in ((None, plain), ("1.0", split)):
                made = engine.serve(replace(crowd, seed=6 + turn))
                if turn:
                    taken[name].append(made.cpu_seconds)
    return min(taken["1.0"]) / min(taken[None])


def _named(budget: str | None) -> str:
    return "plain vLLM" if budget is None else f"budget {budget}"


def render(figures: dict[str, Any]) -> str:
    """The figures as text."""
    first = figures["rows"][0]["crowd"]
    heads = ("", "most at once", "mean", "x plain", "steps", "tokens/CPU s", "x plain",
             "preempted", "prefix hits", "compaction")  # fmt: skip
    lines: list[Sequence[str]] = [heads]
    for row in figures["rows"]:
        crowd = row["crowd"]
        rate, plain = (one["tokens_out"] / one["cpu_seconds"] for one in (crowd, first))
        lines.append((
            _named(row["budget"]), f"{crowd['most']}", f"{crowd['mean']:.1f}",
            f"{crowd['mean'] / first['mean']:.2f}", f"{crowd['steps']}", f"{rate:.1f}",
            f"{rate / plain:.2f}", f"{crowd['preemptions']}", f"{row['prefix_hits']:.1%}",
            f"{row['compaction_share']:.1%}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return f"{table}\nCPU time at budget 1.0 over plain vLLM's: {figures['overhead']:.2f}\n"
