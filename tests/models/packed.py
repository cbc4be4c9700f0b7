"""Linear layers that only they can read, as kernels for inference have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """Eight bits per weight, no `weight`, no gradients; `rounded` also rounds the activations."""

    rounded = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def dequantised(self) -> Tensor:
        return self.qweight.to(self.scales.dtype) * self.scales

    @torch.no_grad()
    def forward(self, given: Tensor) -> Tensor:
        if self.rounded:
            step = given.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            given = (given / step).round() * step
        answer = given @ self.dequantised().T
        return answer if self.bias is None else answer + self.bias


class RoundingLinear(PackedLinear):
    rounded = True


class CurvedLinear(PackedLinear):
    """Not linear: what it multiplies by depends on what it is given."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given.abs().sqrt())


def pack(model: Any, kind: type[PackedLinear] = PackedLinear) -> Any:
    """Replace all linear layers but the head's."""
    _replace(model, lambda layer: kind(layer))
    return model


def dequantise(model: Any) -> Any:
    """The same with plain layers of the same weights."""

    def plain(layer: nn.Linear) -> nn.Linear:
        with torch.no_grad():
            layer.weight.copy_(PackedLinear(layer).dequantised())
        return layer

    _replace(model, plain)
    return model


def _replace(model: Any, change: Any) -> None:
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, change(child))
