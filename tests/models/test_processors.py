"""Which processor a checkpoint gets, with torchvision, without it, and beside a broken one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof import load_model
from hkvprof.errors import ModelError
from hkvprof.heads import Modality
from hkvprof.models import processors
from hkvprof.models import vision as vision_backend
from hkvprof.models.vision import AutoVisionProcessor
from tests.models.conversations import assistant, picture, user
from tests.models.families import FAMILIES, processor_of, words
from tests.models.test_processing import QWEN, run_python
from tests.models.tiny import build_covered


def broken_torchvision(folder: Path, error: str) -> Path:
    """A torchvision as pip leaves it beside a torch of another build."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}\n")
    metadata = folder / "torchvision-0.28.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    return folder


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError", "OSError", "KeyError"])
def test_a_broken_torchvision_does_not_work(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(broken_torchvision(tmp_path, f"{error}('nms is missing')"))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    problem = vision_backend.torchvision_problem.__wrapped__()
    assert problem.startswith("it does not load: ")
    assert "nms is missing" in problem


def test_a_missing_torchvision_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert vision_backend.torchvision_problem.__wrapped__() == "it is not installed"


def test_a_broken_torchvision_leads_to_pillow(tmp_path: Path) -> None:
    """In a process of its own: transformers believes that torchvision is there."""
    path = broken_torchvision(tmp_path, "RuntimeError('operator torchvision::nms does not exist')")
    program = (
        "from transformers.utils import is_torchvision_available\n"
        "assert is_torchvision_available()\n"
        "from hkvprof import load_model\n"
        "from tests.models.conversations import VISION_CASES\n"
        "model, processor = load_model('tinyvl', device='cpu')\n"
        "inputs = processor.encode(VISION_CASES['one image']()).to(model.device, model.dtype)\n"
        "assert model(**inputs).logits.isfinite().all()\n"
        "print(type(processor).__name__)\n"
    )
    assert run_python("-c", program, path=str(path)) == "PillowVisionProcessor\n"


@pytest.mark.parametrize(
    ("settings", "patch", "edges"),
    [
        (
            {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
            14,
            (3136, 12845056),
        ),
        (
            {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16},
            16,
            (65536, 16777216),
        ),
    ],
    ids=["as Qwen2.5-VL has it", "as Qwen3-VL has it"],
)
def test_settings_as_the_hub_has_them(
    settings: dict[str, Any], patch: int, edges: tuple[int, int], tmp_path: Path
) -> None:
    settings |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "x"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "x"}')
    processor = processors.pillow_image_processor(str(tmp_path), QWEN, local=True)
    assert processor.patch_size == patch
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == edges
    grid = processor(images=[picture(30, 30)], return_tensors="pt")["image_grid_thw"][0]
    assert int(grid.prod()) * patch**2 >= edges[0], "small images are scaled up to the minimum"


def test_other_image_processors_need_torchvision(tmp_path: Path) -> None:
    settings = '{"image_processor_type": "Idefics3ImageProcessor"}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises(ModelError, match="Idefics3ImageProcessor, which needs torchvision"):
        processors.pillow_image_processor(str(tmp_path), QWEN, local=True)


def saved(name: str, folder: Path) -> Path:
    """A tiny vision model with its processor as a folder."""
    model = build_covered(name)
    model.save_pretrained(folder)
    processor, _ = processor_of(name, model)
    if isinstance(processor, AutoVisionProcessor):
        processor.processor.save_pretrained(folder)
        return folder
    family = FAMILIES[name]
    processor.tokenizer.save_pretrained(folder)
    settings = {"processor_class": family.processor}
    settings |= {"image_processor_type": family.image_processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", ["llava", "paligemma"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_checkpoint_whose_images_need_no_torchvision(name: str, tmp_path: Path) -> None:
    model, processor = load_model(saved(name, tmp_path), device="cpu")
    assert isinstance(processor, AutoVisionProcessor)
    encoded = processor.encode([[user(picture(56, 56), words(20)), assistant("w1")]])
    assert int((encoded.modality == Modality.IMAGE).sum()) == 4
    assert "labels" not in encoded.inputs, "a model given labels computes a loss"
    with torch.no_grad():
        assert model(**encoded.to(model.device, model.dtype)).loss is None


@pytest.mark.skipif(vision_backend.torchvision_works(), reason="torchvision works here")
@pytest.mark.parametrize("name", ["llava-onevision", "internvl", "mistral3"])
def test_a_checkpoint_whose_processor_needs_torchvision(name: str, tmp_path: Path) -> None:
    message = r"does not load without torchvision \(it .*\): .*hkvprof\[video\].* transformers says"
    with pytest.raises(ModelError, match=message) as caught:
        load_model(saved(name, tmp_path), device="cpu")
    assert "\n" not in str(caught.value)
