"""Do gradients pass through a model's linear layers? Calibration rests on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hkvprof.errors import ModelError
from hkvprof.models.tuners import base_layer, is_tuner
from hkvprof.models.weights import is_opaque, passes_gradients

_OWN = ("torch", "transformers")


def require_gradients(model: nn.Module) -> None:
    """Raise ModelError naming a kind of linear layer whose gradients are missing or wrong.

    One layer of each kind is tried that is not plain: quantised, adapted, or of another package.
    """
    for layer in _kinds(model):
        if passes_gradients(layer):
            continue
        kind = type(base_layer(layer))
        raise ModelError(
            f"gradients do not pass through this model's layers of {kind.__module__}."
            f"{kind.__name__}: the recipe 'measured' needs them. Load the model dequantised or "
            "unquantised to calibrate it, or take the recipe 'paper', which reads prompts alone"
        )


def _kinds(model: nn.Module) -> Iterator[nn.Module]:
    seen: set[Any] = set()
    for layer in model.modules():
        if not hasattr(layer, "in_features") or not _is_special(layer):
            continue
        base = base_layer(layer)
        kind = (
            type(layer), type(base), type(getattr(base, "weight", None)),
            repr(getattr(base, "quantization_scheme", "")),
        )  # fmt: skip
        if kind not in seen:
            seen.add(kind)
            yield layer


def _is_special(layer: nn.Module) -> bool:
    patched = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    foreign = type(layer).__module__.split(".")[0] not in _OWN
    return is_tuner(layer) or is_opaque(layer) or patched or foreign
