"""Weights wherever they lie (in the module, sharded over processes, offloaded) and however they are
stored (plain, quantised, changed by adapters)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hkvprof.errors import ModelError, out_of_memory
from hkvprof.models.wrappers import base_layer, is_tuner, runs_adapters

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AT_ONCE = 1024
"""Inputs that a layer is asked with at a time."""


def is_projection(module: Any) -> bool:
    """Whether this is a linear layer, even one that keeps no `weight` (GPTQ, packed formats)."""
    return isinstance(module, nn.Module) and (
        hasattr(module, "weight") or hasattr(module, "in_features")
    )


def is_opaque(layer: nn.Module) -> bool:
    """Whether a linear layer's weights are stored in a form that only the layer itself can read:
    packed, in a tensor class of a library, or in eight bits."""
    if not hasattr(layer, "in_features"):
        return False
    weight: Any = getattr(layer, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    return not (plain and weight.ndim == 2 and weight.dtype in _FLOATS)


def whole_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter of `module` as one plain tensor.

    A parameter that FSDP has sharded is gathered from all processes, so that all of them must ask
    for it; one that accelerate has offloaded (`device_map`) is fetched onto the device that the
    module computes on.
    """
    parameter: Any = getattr(module, name)
    if hasattr(parameter, "full_tensor"):  # a DTensor
        return parameter.full_tensor()
    if parameter.device.type != "meta" or not hasattr(module, "_hf_hook"):
        return parameter
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach().clone()


@contextmanager
def gathered(model: nn.Module, part: nn.Module) -> Iterator[None]:
    """While within, a part of a model can be called by itself, also where FSDP has sharded it: all
    processes must come here."""
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    around = [module for module in sharded if any(child is part for child in module.modules())]
    if not around:
        yield
        return
    around[-1].unshard()  # the innermost
    try:
        yield
    finally:
        around[-1].reshard()


def effective_weight(layer: nn.Module) -> Tensor:
    """What a linear layer multiplies by, [out, in]: dequantised, with the adapters that run.

    Raises ModelError where the layer cannot be run.
    """
    base = base_layer(layer)
    if not runs_adapters(layer) and not is_opaque(base):
        return whole_weight(base)
    columns = torch.arange(int(base.in_features))
    parts = [columns_of(layer, part) for part in columns.split(_AT_ONCE)]
    return torch.cat(parts).T.contiguous()


def columns_of(layer: nn.Module, columns: Int[Tensor, " n"]) -> Float[Tensor, "n out"]:
    """Columns of a linear layer's weight, asked of the layer itself: its answers to unit vectors,
    which are exact however weights are packed and activations scaled. Raises ModelError."""
    base = base_layer(layer)
    dtype, device = _computes_in(base)
    units = torch.zeros(len(columns) + 1, int(base.in_features), dtype=dtype, device=device)
    units[torch.arange(len(columns)), columns.to(device)] = 1  # the last stays 0: it gives the bias
    with torch.no_grad(), _answering(layer) as ready:
        answers = ready(units)
    return answers[:-1] - answers[-1]


def passes_gradients(layer: nn.Module) -> bool:
    """Whether a layer computes a linear function, and its gradients are those of that function.

    Kernels for inference give none, or (through rounded activations) zeros.
    """
    base = base_layer(layer)
    dtype, device = _computes_in(base)
    steps = torch.randn(17, int(base.in_features), generator=torch.Generator().manual_seed(0))
    steps[-1] = 0
    with torch.enable_grad(), _answering(layer) as ready:
        point = torch.ones_like(steps[:2]).to(device, dtype).requires_grad_()
        answer = ready(point).float().sum()
        if not answer.requires_grad:
            return False
        try:
            (slope,) = torch.autograd.grad(answer, point)
        except (RuntimeError, NotImplementedError):
            return False
        moved = ready(steps.to(device, dtype)).detach().float().sum(-1)
    expected = moved[:-1] - moved[-1]
    found = steps[:-1].to(device) @ slope[0].float()
    return bool((found - expected).norm() <= 0.2 * expected.norm())


def rounds_inputs(layer: nn.Module) -> bool:
    """Whether a linear layer rounds what it is given, beyond its own dtype: its answers jump."""
    base = base_layer(layer)
    dtype, device = _computes_in(base)
    given = torch.randn(16, int(base.in_features), generator=torch.Generator().manual_seed(0))
    given = given.to(device, dtype)
    expected = given.double() @ effective_weight(layer).double().T
    with torch.no_grad(), _answering(layer) as ready:
        found = ready(given).double()
    return bool(
        (found - expected).norm() > max(1.5 * torch.finfo(dtype).eps, 1e-4) * expected.norm()
    )


def _computes_in(base: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device of inputs that a layer takes."""
    held = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
    dtype = next((tensor.dtype for tensor in held if tensor.dtype in _FLOATS), torch.float32)
    hook = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    device = hook if hook is not None else next((t.device for t in held), torch.device("cpu"))
    return dtype, torch.device(device)


@contextmanager
def _answering(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer as it infers, without its bias; the layer itself is left as it was.

    Raises ModelError, naming the layer's class, when it cannot be run.
    """
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield _without_bias(layer)
    except Exception as error:  # foreign kernels raise anything
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = type(base_layer(layer))
        raise ModelError(
            f"the weights of {kind.__module__}.{kind.__name__} cannot be read on this machine "
            f"({first[:200]}): expected a layer that runs here; load the model dequantised, or on "
            "the device its kernels are for"
        ) from error
    finally:
        for module in training:
            module.training = True


def _without_bias(layer: nn.Module) -> nn.Module:
    """A shallow copy without bias: a large one would drown the weights in rounding."""
    if is_compressed(layer):
        return _decompressed(layer)
    bare = copy.copy(layer)
    bare._parameters = {n: None if n == "bias" else p for n, p in layer._parameters.items()}
    bare._buffers = {n: None if n == "bias" else b for n, b in layer._buffers.items()}
    bare._modules = {
        n: _without_bias(m) if n == "base_layer" and m is not None else m
        for n, m in layer._modules.items()
    }
    return bare


def is_compressed(layer: nn.Module) -> bool:
    """Whether compressed-tensors will unpack this layer when the model first runs."""
    return getattr(getattr(layer, "quantization_status", None), "value", "") == "compressed"


def _decompressed(layer: nn.Module) -> nn.Module:
    from compressed_tensors.compressors.base import decompress_module

    unpacked = copy.deepcopy(layer)
    decompress_module(unpacked, leave_decompressed=False)
    return _without_bias(unpacked)


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
    """One linear layer of every kind that does not store plain weights."""
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
