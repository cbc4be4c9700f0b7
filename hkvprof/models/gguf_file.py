"""GGUF files, dequantised once into ordinary checkpoint folders.

transformers reads the weights (its architectures, its names, its order of rotary pairs); here it is
checked that they are all there. Nothing here opens a network connection.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from hkvprof.errors import ModelError, out_of_memory
from hkvprof.lazy import require_extra
from hkvprof.models.converted import converted_folder
from hkvprof.models.gguf_tokenizer import Field, read_tokenizer

_MAGIC = b"GGUF"
_UNREAD = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that change positions, and that transformers passes over."""


def ensure_checkpoint(file: Path, extra: str = "gguf", cache_dir: Path | None = None) -> Path:
    """Folder with the checkpoint made of a GGUF file; it is converted on the first call.

    All weights become float32, exactly (4 bytes each on disk, and in memory meanwhile), so that
    `dtype` "auto" is float32. The folder is named after the file's SHA-256: where the file lies,
    and what it is called, does not matter. `cache_dir` as in `converted_folder`, `extra` the one
    that brings the package gguf. Raises UsageError without it, ModelError for a file that is not
    there, is no GGUF, is cut short, or that transformers cannot read in full.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"expected a GGUF file at {file}: {error.strerror}") from error
    if magic != _MAGIC:
        raise ModelError(f"{file} is no GGUF file: expected it to begin with 'GGUF'")
    return converted_folder(f"gguf-{digest[:16]}", lambda to: _convert(file, to, extra), cache_dir)


def _convert(file: Path, folder: Path, extra: str) -> None:
    """Write weights, configuration and tokenizer of `file` into `folder`."""
    reader = _opened(file, extra)

    def field(name: str) -> Any:
        found = reader.fields.get(name)
        return None if found is None else found.contents()

    with tempfile.TemporaryDirectory() as alone:  # what lies beside the file is not the model's
        link = Path(alone) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            _check_read_in_full(file, field, {tensor.name for tensor in reader.tensors})
            model = _read_model(link)
            tokenizer = read_tokenizer(link, field)
        except Exception as error:  # transformers raises nearly anything on files it cannot read
            if out_of_memory(error):
                raise
            raise _unreadable(file, str(link), error) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unreadable(file: Path, link: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(link, str(file))
    if isinstance(error, ModelError):
        return ModelError(reason)
    return ModelError(
        f"transformers {transformers.__version__} cannot read {file} ({reason[:200]}): use a "
        "checkpoint written by save_pretrained"
    )


def _opened(file: Path, extra: str) -> Any:
    """A reader of the package gguf. Raises ModelError for a file that is cut short."""
    gguf = require_extra("gguf", extra)
    try:
        return gguf.GGUFReader(str(file))
    except Exception as error:  # of damaged files it believes every number
        if isinstance(error, OSError):
            raise ModelError(f"cannot read {file}: {error.strerror or error}") from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise ModelError(f"{file} is cut short or damaged ({reason}): copy it again") from error


def _check_read_in_full(file: Path, field: Field, tensors: set[str]) -> None:
    """Raises ModelError for a part of a model, and for what transformers passes over in silence."""
    if (field("split.count") or 1) > 1:
        raise ModelError(f"{file} is one part of several: join them (llama-gguf-split --merge)")
    scaling = field(f"{field('general.architecture')}.rope.scaling.type") or "none"
    if scaling != "none" or tensors & set(_UNREAD):
        raise ModelError(
            f"{file} scales its positions, which transformers does not read from a GGUF file: use "
            "a checkpoint written by save_pretrained"
        )


def _read_model(file: Path) -> Any:
    """The model with plain float32 weights. Raises ModelError where the file lacks some."""
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # else weights may stay packed, and cannot be saved
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{file} lacks {len(missing)} of the model's weights (such as {missing[0]}), or "
            f"transformers {transformers.__version__} does not find them: copy it again, or use a "
            "checkpoint written by save_pretrained"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
