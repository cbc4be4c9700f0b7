"""Videos, given as frames: through torchvision where it is, refused with the reason where not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import hkvprof
from hkvprof.errors import SampleError
from hkvprof.heads import Modality
from hkvprof.models.vision import torchvision_works
from hkvprof.samples.read import Sample
from tests.models.conversations import picture, user
from tests.models.families import processor_of, words
from tests.models.test_processing import TORCHVISION, run_python
from tests.models.tiny import build_covered
from tests.models_for_tests import apply

TAKES_VIDEO = ("qwen2-vl", "qwen2.5-vl")
needs_torchvision = pytest.mark.skipif(
    not torchvision_works(), reason="torchvision is not usable here (see test_processing.py)"
)


def clip(frames: int, fps: float) -> dict[str, Any]:
    """A question about a video."""
    shown = {"type": "video", "frames": [picture(56, 56, i) for i in range(frames)], "fps": fps}
    asked = user(words(70))
    return {**asked, "content": [shown, *asked["content"]]}


@needs_torchvision
@pytest.mark.parametrize("name", TAKES_VIDEO)
def test_a_video_from_calibrate_to_generate(name: str) -> None:
    model = build_covered(name)
    processor, _ = processor_of(name, model)
    messages = [clip(4, 2.0), clip(6, 1.0)]
    encoded = processor.encode([[message] for message in messages])
    grids = encoded.inputs["video_grid_thw"]
    assert grids[:, 0].tolist() == [2, 3], "two frames make one step in time"
    shown = (encoded.modality == Modality.VIDEO).sum(dim=1)
    assert shown.tolist() == (grids.prod(dim=1) // 4).tolist()
    samples = [Sample(str(i), "t", (m,), reply=words(5, i)) for i, m in enumerate(messages)]
    profile = hkvprof.calibrate(model, processor, samples, hkvprof.Recipe(budget=0.2))
    inputs = encoded.to(model.device, model.dtype)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    dense = model.generate(**inputs, **options).logits
    with apply(model, profile, budget=1.0):
        whole = model.generate(**inputs, **options).logits
    assert all(torch.equal(a, b) for a, b in zip(dense, whole, strict=True))
    with apply(model, profile) as handle:
        pruned = model.generate(**inputs, **options).logits
        assert handle.receipt().compressed_layers == 2
    assert torch.equal(pruned[0], dense[0])
    assert not torch.equal(pruned[1], dense[1])


@needs_torchvision
def test_the_rate_reaches_the_positions() -> None:
    """Qwen2.5-VL places frames in time: seconds between two steps are frames a step over fps."""
    model = build_covered("qwen2.5-vl")
    processor, _ = processor_of("qwen2.5-vl", model)
    seconds = [processor.encode([[clip(4, fps)]]).inputs["second_per_grid_ts"] for fps in (1, 4)]
    assert [float(each) for each in seconds] == [2.0, 0.5]
    kept = processor.encode([[clip(4, 3.0)]]).to(torch.device("cpu"), torch.bfloat16)
    assert kept["second_per_grid_ts"].dtype == torch.float32


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_other_models_refuse_video(name: str) -> None:
    processor, _ = processor_of(name, build_covered(name))
    message = r"video input is not supported for (llava|gemma3): give the frames as images"
    with pytest.raises(SampleError, match=message):
        processor.encode([[clip(2, 1.0)]])


@pytest.mark.skipif(torchvision_works(), reason="torchvision works here")
@pytest.mark.parametrize("name", TAKES_VIDEO)
def test_without_torchvision_video_is_refused(name: str) -> None:
    processor, _ = processor_of(name, build_covered(name))
    with pytest.raises(SampleError, match=r"video input needs torchvision \(it .*hkvprof\[video\]"):
        processor.encode([[clip(2, 1.0)]])


@pytest.mark.skipif(
    torchvision_works() or not TORCHVISION,
    reason="HKVPROF_TORCHVISION names no folder with torchvision (see test_processing.py)",
)
def test_the_same_beside_a_torchvision() -> None:
    """This module and all models with their real processors, in a process with torchvision."""
    files = [str(Path(__file__).with_name(f)) for f in ("test_video.py", "test_end_to_end.py")]
    flags = ["-q", "-p", "no:cacheprovider", "-k", os.environ.get("HKVPROF_MODELS", "")]
    arguments = ["-m", "tests.models.torchvision_shim", "pytest", *files, *flags]
    assert " passed" in run_python(*arguments, path=TORCHVISION)
