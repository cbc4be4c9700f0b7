"""Loading models by alias, hub id or folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from hkvprof.errors import ModelError, UsageError
from hkvprof.models.aliases import ALIASES, TINYVL_FOLDER
from hkvprof.models.processing import ChatProcessor, load_processor

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Any, ChatProcessor]:
    """Load a model in eval mode and its processor.

    `name_or_path` is an alias (`hkvprof models`), a hub id or a folder; `dtype` a torch dtype or
    its name; `device` defaults to CUDA where present. Raises ModelError when the weights cannot be
    had, UsageError on a wrong dtype or device.
    """
    source = resolve_source(str(name_or_path))
    options: dict[str, Any] = {
        "dtype": _dtype(dtype),
        "attn_implementation": attn_implementation,
        "local_files_only": Path(source).is_dir(),
    }
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model = _model_class(source, options["local_files_only"]).from_pretrained(source, **options)
        processor = load_processor(source, model.config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unavailable(str(name_or_path), source, error) from error
    if device_map is None:
        model = model.to(_device(device))
    return model.eval(), processor


def resolve_source(name: str) -> str:
    """The folder or hub id behind `name`. Raises ModelError for a path that does not exist."""
    if name == "tinyvl":
        return str(TINYVL_FOLDER)
    if name == "smollm2":
        from hkvprof.models.smollm2 import ensure_checkpoint

        return str(ensure_checkpoint())
    if name in ALIASES:
        return ALIASES[name].hub_id
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        close = difflib.get_close_matches(name, ALIASES, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else " `hkvprof models` lists aliases."
        raise ModelError(
            f"no model {name!r}: expected an alias, a hub id such as Qwen/Qwen2.5-VL-7B-Instruct, "
            f"or an existing folder.{hint}"
        )
    return name


def _model_class(source: str, local: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(source, local_files_only=local)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return wanted


def _unavailable(name: str, source: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"the weights of {name!r} cannot be had ({reason[:200]}). Three ways to provide them: "
        f"(1) a folder: --model /path/to/{Path(source).name}; (2) the hub cache: `hf download "
        f"{source}` on a connected machine, then copy HF_HOME here; (3) a network connection "
        "(and HF_TOKEN for gated models)"
    )
