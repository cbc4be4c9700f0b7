"""The tokenizer that a GGUF file describes.

What stands in the file is vocabulary, merges, special tokens and the name of a way to split text.
Of byte-level vocabularies ("gpt2") the tokenizer is built here, because releases of transformers
split by other rules than the name says, mistake the end of a turn, or add a BOS. Others are
transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from hkvprof.errors import ModelError

Field = Callable[[str], Any]
"""A field of the file by its name; None where it has none."""

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
_QWEN2 = ("qwen2", "deepseek-r1-qwen")


def read_tokenizer(file: Path, field: Field) -> Any:
    """The tokenizer of a GGUF file with these fields, chat template included.

    Raises ModelError for a vocabulary without a known way to split text, or a file without one;
    what transformers raises (nearly anything) for one that it cannot read.
    """
    kind, tokens = field("tokenizer.ggml.model"), field("tokenizer.ggml.tokens")
    if not kind or not tokens:
        raise ModelError(f"{file} holds no tokenizer: expected a GGUF file of a whole model")
    special = {name: field(key) for name, key in _SPECIAL.items()}
    named = {name: tokens[index] for name, index in special.items() if index is not None}
    if kind == "gpt2":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(file, field), clean_up_tokenization_spaces=False, **named
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        for name, token in named.items():
            setattr(tokenizer, name, token)
    tokenizer.chat_template = field("tokenizer.chat_template")
    return tokenizer


def _byte_level(file: Path, field: Field) -> Tokenizer:
    """Byte-level BPE; a BOS only where the file asks for it."""
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges") or ()]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    name = field("tokenizer.ggml.pre") or "none"
    if name in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _splitting(file, name)
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, field("tokenizer.ggml.token_type") or (), strict=False))
    control = [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])
    if field("tokenizer.ggml.add_bos_token"):
        index = field("tokenizer.ggml.bos_token_id")
        first = tokens[index]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, index)]
        )
    return backend


def _splitting(file: Path, name: str) -> Any:
    """How text is split before merging, by the name in `tokenizer.ggml.pre`."""
    if name in ("smollm", "gpt-2"):
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if name == "gpt-2":
            return words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    regex = PRETOKENIZE_REGEX if name in _QWEN2 else _known_to_transformers(name)
    if regex is None:
        raise ModelError(
            f"{file} splits text in a way that is not known here ({name!r} as "
            "tokenizer.ggml.pre), and its tokens would be wrong: use the model's own checkpoint"
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _known_to_transformers(name: str) -> str | None:
    """The rule of transformers for this name; None for none, and in releases that have no table."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as table
    except ImportError:
        return None
    rules: dict[str, str] = getattr(table, "GGUF_PRE_TOKENIZER_SPLITS", {})
    return rules.get(name)
