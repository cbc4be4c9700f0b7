"""What runs here: versions, device, kernels."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.bench.regime import device_name
from hkvprof.models.vision_backend import torchvision_problem
from hkvprof.runtime import kernels


def environment(model: Any) -> dict[str, str]:
    """Facts that a bug report needs, by name; no paths and no names of machines or people."""
    return {
        "hkvprof": hkvprof.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "torchvision": _torchvision(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "kernels": kernels.status(),
    }


def _torchvision() -> str:
    problem = torchvision_problem()
    if problem:
        return f"not used: {problem}"
    import torchvision

    return str(torchvision.__version__)
