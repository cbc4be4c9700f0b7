"""Inputs of AutoProcessor, made by a torchvision that need not match this torch.

One that does match is left alone: its operators would be declared twice, which ends the process.

Image transforms are Python code on top of torch; only torchvision's own operators are compiled, and
a build for another torch cannot load them. Declaring those that torchvision decorates at import is
enough to import it. Run as a script, in a process of its own, because transformers looks for
torchvision once: `PYTHONPATH=TORCHVISION_FOLDER python -m tests.models.torchvision_shim OUT`, or
with `pytest ARGUMENTS` in place of OUT to run tests beside such a torchvision.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch.library import Library

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_operators() -> Library | None:
    """Declare nms where the compiled one does not load; keep the result alive.

    Whether it loads is asked of another process: a failing import leaves parts behind.
    """
    command = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        return None
    library = Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + SIGNATURE)
    return library


def main(out: Path) -> None:
    """Write the inputs that AutoProcessor makes of every case."""
    import torchvision
    from transformers import AutoConfig

    from hkvprof.models.processors import load_processor
    from hkvprof.models.sources import TINYVL_FOLDER
    from hkvprof.models.vision import AutoVisionProcessor
    from tests.models.conversations import VISION_CASES

    source = str(TINYVL_FOLDER)
    processor = load_processor(source, AutoConfig.from_pretrained(source), local=True)
    assert isinstance(processor, AutoVisionProcessor), type(processor)
    encoded = {name: processor.encode(make()) for name, make in VISION_CASES.items()}
    cases = {name: (case.inputs, case.modality) for name, case in encoded.items()}
    torch.save({"torchvision": torchvision.__version__, "cases": cases}, out)


if __name__ == "__main__":
    kept = declare_operators()
    if sys.argv[1] == "pytest":
        import pytest

        sys.exit(pytest.main(sys.argv[2:]))
    main(Path(sys.argv[1]))
