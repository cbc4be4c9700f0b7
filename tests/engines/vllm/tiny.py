"""A tiny random Llama on disk, its profile, and an engine run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hkvprof.heads import HeadGrid
from hkvprof.profile.record import Profile
from tests.engines.curves import random_profile

GRID = HeadGrid(layers=3, query_heads=4, kv_heads=2, head_dim=32)
VOCABULARY = 128


def save_model(folder: Path) -> Path:
    """A Llama whose attention is far from even."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=GRID.layers,
        num_attention_heads=GRID.query_heads, num_key_value_heads=GRID.kv_heads,
        head_dim=GRID.head_dim, vocab_size=VOCABULARY, max_position_embeddings=4096,
        initializer_range=0.15, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def profile() -> Profile:
    """A profile of the tiny model, whatever its weights; groups of heads in 16 and in 4 bits."""
    return random_profile(GRID, 4)


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random token numbers."""
    draw = np.random.default_rng(seed)
    return [draw.integers(2, VOCABULARY, size=n).tolist() for n in lengths]


@dataclass(frozen=True)
class Told:
    """What an engine's run gave: see `drive`."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    kept: dict[str, dict[str, list[int]]]
    preemptions: int
    cached: list[int]
    free: int
    blocks: int
    most_running: int
    scheduler: str
    receipts: list[Any] = field(default_factory=list)
    error: str = ""


def run_engine(job: dict[str, Any], timeout: int = 1200) -> Told:
    """Run `drive` with this job. A start-up that fails has an `error` and nothing else."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.engines.vllm.drive", json.dumps(job)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    if not lines:
        return Told([], [], {}, 0, [], 0, 0, 0, "", error=done.stderr[-6000:] or done.stdout)
    return Told(**json.loads(lines[-1].removeprefix("TOLD ")))
