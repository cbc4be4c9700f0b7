"""Models of a published shape with random weights: to time a size that cannot be downloaded.

Time and bytes of a decoding step depend on shapes alone, answers do not come out of these models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hkvprof.errors import UsageError
from hkvprof.models.load import _device, _dtype


@dataclass(frozen=True)
class Shape:
    """Sizes of one decoder layer, from the config that its makers published."""

    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    context: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    layers: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, without norms and biases."""
        attention = 2 * self.hidden * self.head_dim * (self.query_heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp


SHAPES = {
    "qwen2.5-vl-7b": Shape(
        query_heads=28,
        kv_heads=4,
        head_dim=128,
        hidden=3584,
        mlp=18944,
        context=128_000,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        layers=28,
        vocabulary=152_064,
    ),
    "tiny": Shape(
        query_heads=4,
        kv_heads=2,
        head_dim=16,
        hidden=64,
        mlp=96,
        context=128_000,
        rope_theta=1e4,
        mrope_section=(2, 3, 3),
        layers=2,
        vocabulary=8192,
    ),
}
"""Names as in `hkvprof models`; `tiny` is for trying a benchmark where there is no GPU."""

VOCABULARY = 1024
"""Unless asked for otherwise: embeddings are no part of what is measured, and 152,064 rows take
2 GiB."""


def build_shape(
    name: str, layers: int, dtype: str, device: str | None, vocabulary: int = VOCABULARY
) -> Any:
    """`layers` layers of the real class, random weights, in eval mode under SDPA.

    `dtype` "auto" is bfloat16. The vision tower is a stub. Raises UsageError.
    """
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}: expected {' or '.join(SHAPES)}")
    if layers < 1:
        raise UsageError(f"a model of {layers} layers: expected at least 1")
    kind = torch.bfloat16 if dtype == "auto" else _dtype(dtype)
    return make_shape(SHAPES[name], layers, kind, _device(device), vocabulary)


def make_shape(
    shape: Shape, layers: int, dtype: torch.dtype, device: torch.device, vocabulary: int
) -> Any:
    """The same of any shape."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=_text(shape, layers, vocabulary), vision_config=_stub(shape.hidden)
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            model = Qwen2_5_VLForConditionalGeneration._from_config(
                config, attn_implementation="sdpa"
            )
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()


def _text(shape: Shape, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "mrope_section": list(shape.mrope_section),
        },
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _stub(hidden: int) -> dict[str, Any]:
    """The smallest vision tower; nothing passes through it."""
    sizes = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    return {**sizes, "out_hidden_size": hidden}
