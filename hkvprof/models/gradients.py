"""Gradients through linear layers whose kernels give none: calibration rests on them.

Kernels for packed weights (GPTQ, AWQ) are for inference alone, and rounded activations have
gradients of zero. A linear layer's gradient is known all the same: that of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hkvprof.errors import ModelError
from hkvprof.models.tuners import base_layer, is_tuner
from hkvprof.models.weights import effective_weight, is_opaque, passes_gradients, rounds_inputs

_OWN = ("torch", "transformers")


@contextmanager
def passing_gradients(model: nn.Module) -> Iterator[None]:
    """Within, gradients pass through all linear layers of `model`; what they compute stays.

    Rounding of activations counts as no change. One layer of each kind is tried that is not plain:
    quantised, adapted, or of another package. Raises ModelError naming a kind whose gradients are
    not those of its weights, because it is not linear.
    """
    kinds = _kinds(model)
    hooks = []
    try:
        for layers in kinds:
            if not is_tuner(layers[0]) and not passes_gradients(layers[0]):
                hooks += [layer.register_forward_hook(_pass) for layer in layers]
        for layers in kinds:
            if not passes_gradients(layers[0]):
                kind = type(base_layer(layers[0]) if not is_tuner(layers[0]) else layers[0])
                raise ModelError(
                    f"layers of {kind.__module__}.{kind.__name__} have no usable gradients: "
                    "expected linear ones, which the recipe 'measured' needs; merge the adapters "
                    "or dequantise the model to calibrate it, or take the recipe 'paper'"
                )
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_gradients(model: nn.Module) -> None:
    """Raise ModelError for a model that `passing_gradients` refuses."""
    with passing_gradients(model):
        pass


def rounds_activations(model: nn.Module) -> bool:
    """Whether a kind of linear layer of `model` computes with rounded activations (int8, FP8)."""
    return any(rounds_inputs(layers[0]) for layers in _kinds(model))


def _pass(layer: nn.Module, given: tuple[Any, ...], answer: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not given or not given[0].requires_grad:
        return answer
    return _OfWeights.apply(given[0], answer.detach(), layer)


class _OfWeights(torch.autograd.Function):
    """A layer's answer as it is, with the gradient of its dequantised weights."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, answer: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.dtype = layer, given.dtype
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return (slope @ effective_weight(ctx.layer).to(slope.dtype)).to(ctx.dtype), None, None


def _kinds(model: nn.Module) -> list[list[nn.Module]]:
    """The layers that are not plain, kind by kind."""
    found: dict[Any, list[nn.Module]] = {}
    for layer in model.modules():
        if hasattr(layer, "in_features") and _is_special(layer):
            base = base_layer(layer)
            scheme = repr(getattr(base, "quantization_scheme", ""))
            kind = (type(layer), type(base), type(getattr(base, "weight", None)), scheme)
            found.setdefault(kind, []).append(layer)
    return list(found.values())


def _is_special(layer: nn.Module) -> bool:
    patched = "forward" in vars(layer) and not hasattr(layer, "_hf_hook")
    foreign = type(layer).__module__.split(".")[0] not in _OWN
    return is_tuner(layer) or is_opaque(layer) or patched or foreign
