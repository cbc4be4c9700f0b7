"""Weights wherever they lie: in the module, sharded over processes, or offloaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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
