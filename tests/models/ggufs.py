"""Tiny random GGUF files, and the same models built directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_HEADS, _KV_HEADS, _WIDTH = 4, 2, 256  # blocks of K-quants are 256 wide
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ["Ġ t", "1 2", "h e", "Ġt he"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> list[str]:
    """All bytes, what the merges make, and the special tokens."""
    merged = [pair.replace(" ", "") for pair in MERGES]
    return [*sorted(bytes_to_unicode().values()), *merged, *CONTROL, "<tool>"]


def built(architecture: str, seed: int = 0) -> Any:
    """A random model, with large biases of its keys if it is a Qwen2."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=5.0)
    return model


def write(path: Path, architecture: str, kind: str = "F32", **fields: Any) -> Any:
    """Write a random model to `path`, matrices as `kind`; the model with what they dequantise to.

    `fields` are of the tokenizer (`pre="smollm"`), or of the file with `__` for dots; None leaves
    one out.
    """
    import gguf

    model = built(architecture)
    writer = gguf.GGUFWriter(path, architecture)
    _write_shape(writer)
    _write_fields(writer, fields)
    for name, weight in model.state_dict().items():
        data, back, raw = _stored(weight.numpy(), kind)
        weight.copy_(torch.from_numpy(back))
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            data = _interleaved(data, _HEADS if "q_proj" in name else _KV_HEADS)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_shape(writer: Any) -> None:
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary()))


def _write_fields(writer: Any, fields: dict[str, Any]) -> None:
    tokens = vocabulary()
    kinds = [3 if token in CONTROL else 4 if token == "<tool>" else 1 for token in tokens]
    start, turn = tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")
    said = {
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": kinds, "merges": MERGES,
        "bos_token_id": start, "eos_token_id": turn, "padding_token_id": start,
        "add_bos_token": False,
    }  # fmt: skip
    said |= {name: value for name, value in fields.items() if "__" not in name}
    named = {f"tokenizer.ggml.{name}": value for name, value in said.items()}
    named |= {n.replace("__", "."): value for n, value in fields.items() if "__" in n}
    for name, value in ({"tokenizer.chat_template": TEMPLATE} | named).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_uint32(name, value)


def _stored(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """The bytes of a weight, what they stand for, and their type; vectors are float32."""
    import gguf

    raw = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else kind]
    if raw.name == "Q4_K":
        data = _blocks_of_four_bits(weight.shape)
    else:
        data = gguf.quantize(weight, raw)
    return data, gguf.dequantize(data, raw).reshape(weight.shape), raw


def _blocks_of_four_bits(shape: tuple[int, ...]) -> np.ndarray:
    """Random Q4_K blocks (the package gguf reads and does not make them): scale and minimum in
    float16, 12 bytes of scales, 128 of values."""
    rows, blocks = shape[0], shape[1] // 256
    random = np.random.default_rng(rows)
    made = random.integers(0, 256, (rows, blocks, 144), dtype=np.uint8)
    scales = random.uniform(1e-5, 3e-4, (rows, blocks, 2)).astype(np.float16)
    made[..., :4] = scales.view(np.uint8)
    return made.reshape(rows, blocks * 144)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: a rotary pair beside each other."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{_NAMES['.'.join(part)]}.{kind}"
