"""The tiny Qwen2.5-VL: its configuration, and growth by layers that changes no logit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hkvprof.models.sources import TINYVL_FOLDER
from hkvprof.testbed.vocabulary import (
    END_OF_TURN,
    IMAGE_PAD,
    PAD,
    TOKEN_IDS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCABULARY_SIZE,
    build_tokenizer,
)

HIDDEN = 256
GROWN_LAYERS = (2, 5)
"""Where growth puts the new layers, as indices in the grown model."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.04,
    "use_sliding_window": False,
    # The sections must sum to half the head dimension. Width gets the lowest frequencies, which
    # would not turn at all over a few columns with the usual base of 1e6.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    "bos_token_id": None,
    "eos_token_id": TOKEN_IDS[END_OF_TURN],
    "pad_token_id": TOKEN_IDS[PAD],
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "out_hidden_size": HIDDEN,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
    "initializer_range": 0.04,
}


def build_config(layers: int) -> Any:
    """The Qwen2_5_VLConfig with this many text layers."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={**_TEXT, "num_hidden_layers": layers, "max_window_layers": layers},
        vision_config=dict(_VISION),
        image_token_id=TOKEN_IDS[IMAGE_PAD],
        video_token_id=TOKEN_IDS[VIDEO_PAD],
        vision_start_token_id=TOKEN_IDS[VISION_START],
        vision_end_token_id=TOKEN_IDS[VISION_END],
        tie_word_embeddings=False,
        pad_token_id=TOKEN_IDS[PAD],
        eos_token_id=TOKEN_IDS[END_OF_TURN],
        bos_token_id=None,
    )


def build_model(layers: int, seed: int) -> Any:
    """A freshly initialised float32 model; the global random state is left as it was."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration._from_config(build_config(layers)).float()


def grow_model(model: Any, seed: int, new_layers: Sequence[int] = GROWN_LAYERS) -> Any:
    """The model with new text layers whose output projections are zero: the same function."""
    old_count = model.config.text_config.num_hidden_layers
    grown = build_model(old_count + len(new_layers), seed)
    kept = [i for i in range(old_count + len(new_layers)) if i not in new_layers]
    origin = {new: old for old, new in enumerate(kept)}
    source = model.state_dict()
    state = grown.state_dict()
    for name, value in state.items():
        prefix, found, rest = name.partition("language_model.layers.")
        if not found:
            state[name] = source[name].clone()
            continue
        index, _, parameter = rest.partition(".")
        if int(index) in origin:
            state[name] = source[f"{prefix}{found}{origin[int(index)]}.{parameter}"].clone()
        elif parameter.startswith(("self_attn.o_proj", "mlp.down_proj")):
            state[name] = torch.zeros_like(value)
    grown.load_state_dict(state)
    return grown


def save_checkpoint(model: Any, folder: Path) -> None:
    """Write the layout of tinyvl/: bfloat16 weights, tokenizer, chat template, processor."""
    final = copy.deepcopy(model).to("cpu", torch.bfloat16)
    final.generation_config.eos_token_id = TOKEN_IDS[END_OF_TURN]
    final.generation_config.pad_token_id = TOKEN_IDS[PAD]
    final.generation_config.do_sample = False
    final.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    shutil.copyfile(TINYVL_FOLDER / "processor_config.json", folder / "processor_config.json")
