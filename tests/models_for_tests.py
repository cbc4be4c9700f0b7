"""Small models for tests: random ones of the real classes, and inputs for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hkvprof
import hkvprof.runtime
from hkvprof.testbed.generator import make_sample


def random_llama(layers: int = 3, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A Llama with 4 query heads on 2 KV heads of width 16, spread-out random weights."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


def token_ids(rows: int, tokens: int, seed: int = 1, vocabulary: int = 64) -> Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (rows, tokens), generator=generator)


def left_padded(lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of a left-padded batch with the given lengths."""
    longest = max(lengths)
    ids = token_ids(len(lengths), longest, seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


apply = functools.partial(hkvprof.runtime.apply, min_tokens=64)
"""Most tests work on prompts that are shorter than what pays in practice."""


def tiny_prompts(images: tuple[int, ...]) -> tuple[Any, list[dict[str, Tensor]]]:
    """tinyvl in float32, and a look-up prompt for each number of images."""
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    samples = [make_sample("list", i, images=n, split="calibration") for i, n in enumerate(images)]
    encoded = [processor.encode([sample.messages]) for sample in samples]
    return model, [one.to(model.device, model.dtype) for one in encoded]
