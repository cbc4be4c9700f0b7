"""Quantised weights: how they are called, and which were tested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hkvprof.models.weights import is_compressed, is_opaque
from hkvprof.models.wrappers import base_layer

TESTED = ("awq", "bitsandbytes", "compressed-tensors", "gptq", "quanto", "torchao")
"""Methods whose packed weights the tests run through calibration and generation (docs/models.md).
Weights that were dequantised when they were loaded are plain ones, whatever the method."""
_OF_PACKAGES = {"optimum": "quanto", "compressed_tensors": "compressed-tensors"}


def quantisation_of(model: Any, layers: Iterable[nn.Module]) -> str:
    """Method and kind ("bitsandbytes-4bit") of a model's weights, "" for unquantised ones.

    As the checkpoint's config says, else as the linear `layers` of its attention look: models are
    also quantised after they were loaded.
    """
    said = _settings(model.config)
    if said:
        return _name(said)
    opaque = next((base_layer(layer) for layer in layers if is_opaque(base_layer(layer))), None)
    return "" if opaque is None else _looks(opaque)


def untested(quantisation: str, layers: Iterable[nn.Module]) -> str:
    """The name of a method that no test has run, if these layers of the attention are packed by it;
    else ""."""
    packed = [layer for layer in map(base_layer, layers) if is_opaque(layer)]
    if not packed:
        return ""
    if any(_in_eight_bit_floats(layer) for layer in packed):
        return f"{quantisation}, multiplied in FP8"
    tested = any(quantisation == name or quantisation.startswith(f"{name}-") for name in TESTED)
    return "" if tested else quantisation


def refusal(model: Any) -> str:
    """Why a quantised model cannot be compressed; empty if nothing speaks against it."""
    if _settings(model.config).get("kv_cache_scheme"):
        return (
            "its checkpoint quantises keys and values too (kv_cache_scheme), in a cache of its own"
        )
    return ""


def bits_per_weight(config: Any, stored: int) -> float:
    """Bits of a linear layer's weight of a checkpoint with this config, scales included; `stored`
    for an unquantised one and for methods that do not say."""
    said = _settings(config)
    if not said or said.get("dequantize"):
        return stored
    bits = _bits(said)
    group = said.get("group_size") or (64 if said.get("load_in_4bit") else 0)
    scales = 16 / group if isinstance(group, int) and group > 0 else 0
    return stored if bits is None else min(float(stored), bits + scales)


def is_converted(config: Any, name: str) -> bool:
    """Whether the checkpoint's config has the linear layer of this name quantised."""
    said = _settings(config)
    lists = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers")
    kept = [entry for key in lists for entry in said.get(key) or ()]
    return not any(str(entry) and str(entry).removeprefix("re:") in name for entry in kept)


def _settings(config: Any) -> dict[str, Any]:
    """The quantisation settings of a model's config as a dict; empty without."""
    said = getattr(config, "quantization_config", None)
    if not said:
        return {}
    data = dict(said) if isinstance(said, Mapping) else dict(vars(said))
    inner = data.get("quantization_config")  # compressed-tensors keeps what the file says inside
    if inner is not None and not isinstance(inner, Mapping) and hasattr(inner, "model_dump"):
        data |= inner.model_dump()
    for private in ("_load_in_4bit", "_load_in_8bit"):
        data.setdefault(private[1:], data.get(private))
    method = data.get("quant_method") or ""
    data["quant_method"] = str(getattr(method, "value", method)).replace("_", "-")
    return data


def _name(said: dict[str, Any]) -> str:
    method = said["quant_method"] or "unnamed"
    if method.startswith("bitsandbytes"):
        return f"bitsandbytes-{4 if said.get('load_in_4bit') else 8}bit"
    detail: Any = ""
    if method in ("gptq", "awq", "hqq") and said.get("bits"):
        detail = f"{said['bits']}bit"
    elif method == "quanto":
        detail = said.get("weights")
    elif method == "torchao":
        detail = _torchao(said.get("quant_type"))
    elif method == "compressed-tensors":
        detail = said.get("format")
    return f"{method}-{detail}"[:200] if detail else method[:200]


def _torchao(kind: Any) -> str:
    if isinstance(kind, Mapping):
        inner = kind.get("default", kind)
        name = inner.get("_type", "") if isinstance(inner, Mapping) else str(inner)
    else:
        name = kind if isinstance(kind, str) else type(kind).__name__
    return str(name).removesuffix("Config")


def _looks(layer: nn.Module) -> str:
    """The name of a method by the class of a layer, or of its weight."""
    weight = getattr(layer, "weight", None)
    kinds = [type(layer), type(weight), type(getattr(weight, "data", None))]
    foreign = [kind for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "builtins")]
    if not foreign:
        return "packed" if weight is None else str(weight.dtype).removeprefix("torch.")
    package = foreign[0].__module__.split(".")[0]
    detail = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}.get(foreign[0].__name__)
    return f"{_OF_PACKAGES.get(package, package)}-{detail or foreign[0].__name__}"


def _in_eight_bit_floats(layer: nn.Module) -> bool:
    """Plain tensors of eight bit floats: the layer is a kernel of its own for them."""
    weight: Any = getattr(layer, "weight", None)
    plain = type(weight) in (torch.Tensor, nn.Parameter) and not is_compressed(layer)
    return plain and weight.dtype.is_floating_point and weight.dtype.itemsize == 1


def _bits(said: dict[str, Any]) -> float | None:
    method = said["quant_method"]
    if method.startswith("bitsandbytes"):
        return 4 if said.get("load_in_4bit") else 8
    if isinstance(said.get("bits"), int):
        return said["bits"]
    if method in ("fp8", "fbgemm-fp8"):
        return 8
    named = f"{said.get('weights')} {_torchao(said.get('quant_type'))}".lower()
    for bits, words in ((2, ("int2",)), (4, ("int4",)), (8, ("int8", "float8"))):
        if any(word in named for word in words):
            return bits
    groups = said.get("config_groups") or {}
    found = [_of(_of(group, "weights"), "num_bits") for group in groups.values()]
    return max((bits for bits in found if bits), default=None)


def _of(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, Mapping) else getattr(record, key, None)
