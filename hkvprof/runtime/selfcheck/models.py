"""Tiny random models for the check, and a profile for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.adapter import view_model
from hkvprof.profile.record import Profile

PROMPT = 48
PADDED = 5
"""Positions of padding before the shorter row of two."""
KEPT = 20
"""Tokens per head of the small budget."""
SCALING = 0.31
"""Of the text model's attention: not what head_dim would give."""
IMAGE = slice(6, 10)
"""Where the image lies in the vision model's prompt: 2 x 2 tokens."""
OFFSET = -2
"""What that image adds to the M-RoPE positions after it: it spans two of them with four tokens."""
_IMAGE, _VIDEO, _START, _END = 5, 6, 7, 8
_VOCABULARY = 64
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
}


@dataclass(frozen=True)
class Talk:
    """A prompt, and the tokens [rows, new] of the passes after it."""

    inputs: dict[str, Tensor]
    passes: tuple[Tensor, ...]

    @property
    def is_padded(self) -> bool:
        """Whether a row is shorter than others."""
        return not bool(self.inputs["attention_mask"].all())

    def mask(self, tokens: int) -> Tensor:
        """The attention mask over `tokens` positions."""
        mask = self.inputs["attention_mask"]
        return torch.cat([mask, mask.new_ones(len(mask), tokens - mask.shape[1])], dim=1)


@contextmanager
def undisturbed() -> Iterator[None]:
    """On the CPU, without gradients or autocast; the caller's random state and modes stay.

    Double precision is set by the models: it needs no kernels that would have to be compiled.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.default_generator.manual_seed(0)  # manual_seed would seed other devices, too
        yield


def text_model() -> Any:
    """A Llama of two layers whose attention has a scaling of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_TEXT, attn_implementation="sdpa"))
    for layer in model.model.layers:
        layer.self_attn.scaling = SCALING
    return model.double().eval()


def vision_model() -> Any:
    """A Qwen2.5-VL of two layers: M-RoPE, with an offset kept on the model between passes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2_5_VLConfig(
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config=_VISION,
        attn_implementation="sdpa",
    )
    return Qwen2_5_VLForConditionalGeneration(config).double().eval()


def text_talk(rows: int = 2) -> Talk:
    """Text; the second of two rows is padded on the left."""
    ids = _ids(rows, PROMPT)
    mask = torch.ones_like(ids)
    mask[1:, :PADDED] = 0
    return Talk({"input_ids": ids, "attention_mask": mask}, (_ids(rows, 1), _ids(rows, 3)))


def image_talk() -> Talk:
    """An image in the prompt of one row."""
    ids = _ids(1, PROMPT)
    ids[:, IMAGE.start - 1], ids[:, IMAGE], ids[:, IMAGE.stop] = _START, _IMAGE, _END
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return Talk(inputs, (_ids(1, 1), _ids(1, 3)))


def _ids(rows: int, count: int) -> Tensor:
    return torch.randint(10, _VOCABULARY, (rows, count))


def uniform(model: Any) -> Profile:
    """Every head static, at the same share."""
    view = view_model(model)
    shape = (view.grid.layers, view.grid.kv_heads)
    ratios = np.array([0.05, 1.0], dtype=np.float32)
    curve = np.broadcast_to(1 - ratios, (1, 1, *shape, len(ratios))).astype(np.float32)
    sparsity = np.zeros((1, view.grid.layers, view.grid.query_heads), dtype=np.float32)
    return Profile(
        fingerprint=view.fingerprint,
        recipe="uniform",
        default_budget=0.5,
        keep=KeepRule(sinks=2, recent=4, window=4),
        strategies=(Strategy(HeadType.STATIC),),
        kappas=(0.1,),
        ratios=ratios,
        lengths=np.ones(1, dtype=np.int64),
        strategy=np.zeros(shape, dtype=np.uint8),
        budget=np.full(shape, 0.5, dtype=np.float32),
        sparsity_mean=sparsity,
        sparsity_std=sparsity.copy(),
        loss=curve,
        output_error=curve.copy(),
        provenance={"recipe": "uniform", "samples": 0},
    )
