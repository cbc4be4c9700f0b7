"""Loading models by alias, hub id, folder or GGUF file."""

from __future__ import annotations

import difflib
import platform
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from hkvprof.errors import HkvError, ModelError, UsageError, out_of_memory
from hkvprof.heads import ModelFingerprint
from hkvprof.models.adapter import view_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.models.processors import load_processor
from hkvprof.models.sources import ALIASES, TINYVL_FOLDER, needs_own_code, own_code_refused
from hkvprof.models.vision import hide_broken_torchvision

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
}
HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's answer before only local files are tried."""


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str = "sdpa",
    fsdp: int | None = None,
) -> tuple[Any, ChatProcessor]:
    """Load a model in eval mode and its processor.

    `name_or_path` is an alias (`hkvprof models`), a hub id, a folder or a GGUF file (converted
    once); `dtype` a torch dtype or its name (`bf16` and the like, too); `device` defaults to CUDA
    where present. `fsdp` spreads the weights over that many processes, each of which calls this, in
    a process group (transformers' DistributedConfig).
    Raises ModelError when the weights cannot be had, UsageError on a wrong dtype or device.
    """
    check_placing(dtype, device, device_map)
    if fsdp is not None and device_map is not None:
        raise UsageError("give fsdp or device_map, not both")
    options: dict[str, Any] = {"dtype": _dtype(dtype), "attn_implementation": attn_implementation}
    if device_map is not None:
        options["device_map"] = device_map
    if fsdp is not None:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=fsdp)
    placed = device_map is not None or fsdp is not None
    target = None if placed else _device(device)
    source = resolve_source(str(name_or_path))
    local = Path(source).is_dir() or not _hub_answers()
    try:
        config, model_class = _model_class(source, local)
        if getattr(config, "vision_config", None) is not None:
            hide_broken_torchvision()
        if getattr(config, "quantization_config", None) is not None and target is not None:
            # Packed weights are put where they run: some cannot be moved afterwards.
            options["device_map"], target = {"": target}, None
        model = model_class.from_pretrained(
            source, local_files_only=local, trust_remote_code=False, **options
        )
        _note_commit(model.config, source)
        processor = load_processor(source, model.config, local)
    except HkvError:
        raise
    except Exception as error:  # transformers raises nearly anything on damaged checkpoints
        if out_of_memory(error):
            raise
        raise _unavailable(str(name_or_path), source, error) from error
    if target is not None:
        model = model.to(target)
    return model.eval(), processor


def check_placing(
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    device_map: str | dict[str, Any] | None,
) -> None:
    """Raise UsageError for a dtype that is unknown, and for devices that are not here."""
    _dtype(dtype)
    if device is not None and device_map is not None:
        raise UsageError("give device or device_map, not both")
    if isinstance(device_map, str) and device_map not in _SPREADS:
        try:
            _device(device_map)
        except UsageError as error:
            known = ", ".join(_SPREADS)
            raise UsageError(f"device map: expected one of {known}, or a device; {error}") from None
    elif device is not None:
        _device(device)


_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to spread a model over devices."""


def model_fingerprint(name_or_path: str | Path) -> ModelFingerprint:
    """The identity of a model from its config alone: no weights are read, `weights_digest` is "".

    Raises ModelError.
    """
    source = resolve_source(str(name_or_path))
    local = Path(source).is_dir() or not _hub_answers()
    try:
        model = _empty_model(source, local)
    except Exception as error:
        raise _unavailable(str(name_or_path), source, error) from error
    return view_model(model).fingerprint


def load_empty(name_or_path: str | Path) -> tuple[Any, ChatProcessor]:
    """A model without weights (meta device) and its processor. Raises ModelError."""
    source = resolve_source(str(name_or_path))
    local = Path(source).is_dir() or not _hub_answers()
    try:
        model = _empty_model(source, local)
        return model, load_processor(source, model.config, local)
    except HkvError:
        raise
    except Exception as error:
        raise _unavailable(str(name_or_path), source, error) from error


def takes_pictures(name_or_path: str | Path) -> bool:
    """Whether a checkpoint's config has a vision tower; loads no weights. Raises ModelError."""
    source = resolve_source(str(name_or_path))
    try:
        config, _ = _model_class(source, Path(source).is_dir() or not _hub_answers())
    except Exception as error:
        raise _unavailable(str(name_or_path), source, error) from error
    return getattr(config, "vision_config", None) is not None


def emulates_bfloat16(model: Any) -> bool:
    """Whether a model computes in bfloat16 on a CPU that is known to have no instructions for it:
    some ten times slower than float32."""
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    asked = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in _BFLOAT16]
    return None not in asked and not any(ask() for ask in asked if ask)


_BFLOAT16 = ("avx512_bf16", "amx_tile")
"""Features of x86 that compute in bfloat16, as torch calls them."""


def _empty_model(source: str, local: bool) -> Any:
    config, model_class = _model_class(source, local)
    with torch.device("meta"):
        return model_class.from_config(config, attn_implementation="sdpa", trust_remote_code=False)


def resolve_source(name: str) -> str:
    """The folder or hub id behind `name`; a GGUF file is converted first, once.

    Raises ModelError for a path that does not exist, such as `out/mine` where there is a folder
    `out`: the hub is not asked for it; and as `gguf_file.ensure_checkpoint`.
    """
    if name == "tinyvl":
        return str(TINYVL_FOLDER)
    if name == "smollm2":
        from hkvprof.models.smollm2 import ensure_checkpoint

        return str(ensure_checkpoint())
    if name in ALIASES:
        return ALIASES[name].hub_id
    if name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir():
        from hkvprof.models import gguf_file

        return str(gguf_file.ensure_checkpoint(Path(name).expanduser()))
    if name and Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    owner, _, rest = name.partition("/")
    if name.startswith((".", "/", "~")) or "/" in rest or not rest or Path(owner).is_dir():
        close = difflib.get_close_matches(name, ALIASES, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`hkvprof models` lists aliases."
        raise ModelError(
            f"no model {name!r}: expected an alias, a hub id such as Qwen/Qwen2.5-VL-7B-Instruct, "
            f"or an existing folder or GGUF file. {hint}"
        )
    return name


def _hub_answers() -> bool:
    """Whether the hub (or the proxy on the way) takes connections; False in offline mode.

    Without it transformers would retry every file for half a minute before it gives up.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    via = urlsplit(proxies.get(hub.scheme) or proxies.get("all") or constants.ENDPOINT)
    port = via.port or (443 if via.scheme == "https" else 80)
    try:
        socket.create_connection((via.hostname or "", port), timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


def _model_class(source: str, local: bool) -> tuple[Any, Any]:
    """The config of a checkpoint and the class that loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return config, AutoModelForImageTextToText
    return config, AutoModelForCausalLM


_SNAPSHOT = re.compile(r"snapshots[/\\]([0-9a-f]{40})[/\\]")


def _note_commit(config: Any, source: str) -> None:
    """Have the config tell the commit of a model of the hub, where transformers does not: newer
    releases note it no more, and the cache's folders are called by it."""
    from transformers.utils.hub import cached_file

    if Path(source).is_dir() or getattr(config, "_commit_hash", None):
        return
    try:
        file = cached_file(source, "config.json", local_files_only=True)
    except OSError:  # it was loaded from elsewhere: nothing tells the commit
        return
    if found := _SNAPSHOT.search(str(file)):
        config._commit_hash = found[1]


def _dtype(dtype: str | torch.dtype) -> Any:
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in DTYPES.values():
        raise UsageError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return wanted


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(device)!r} cannot be used here: {reason}") from None
    return wanted


def _unavailable(name: str, source: str, error: Exception) -> ModelError:
    if needs_own_code(error):
        return own_code_refused(name)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if Path(source).is_dir():
        missing = not (Path(source) / "config.json").is_file()
        expected = "a checkpoint written by save_pretrained, with its processor or tokenizer"
        found = "there is no config.json" if missing else reason
        return ModelError(f"cannot load a model from {source} ({found}): expected {expected}")
    if refused := _refused_by_hub(source, error):
        return ModelError(f"cannot load {name!r}: {refused}")
    if not isinstance(error, OSError):
        return ModelError(f"cannot load {name!r} ({source}): {reason}")
    return ModelError(
        f"the weights of {name!r} cannot be had ({reason}). Three ways to provide them: "
        f"(1) a folder: --model /path/to/{Path(source).name}; (2) the hub cache: `hf download "
        f"{source}` on a connected machine, then copy HF_HOME here; (3) a network connection "
        "(and HF_TOKEN for gated models)"
    )


def _refused_by_hub(source: str, error: BaseException | None) -> str:
    """Why the hub did not give a model, in a sentence; empty where it was something else."""
    from huggingface_hub import errors

    while error is not None:
        if isinstance(error, errors.GatedRepoError):
            return (
                f"{source} is gated: accept its terms on the model's page of the hub, then log in "
                "with `hf auth login` or set HF_TOKEN"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"the hub has no model {source}, or HF_TOKEN may not see it: check the name "
                "(`hkvprof models` lists aliases), or give a folder"
            )
        error = error.__cause__ or error.__context__
    return ""
