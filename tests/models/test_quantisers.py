"""The libraries that quantise, those that run on a CPU; each is skipped where it is not installed.

`pip install bitsandbytes torchao compressed-tensors optimum-quanto` tries them all; docs/models.md
has what was found, GPTQ and AWQ included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hkvprof
from hkvprof.doctor.examine import examine
from hkvprof.models.adapter import view_model
from hkvprof.runtime import apply
from hkvprof.samples.read import Sample
from tests.models.conversations import picture, user
from tests.models.families import processor_of, words
from tests.models.tiny import build_covered

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
CHECKS = ["text", "masked-text"]


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return hf.BitsAndBytesConfig(**options)


def torchao(name: str) -> Any:
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return hf.TorchAoConfig(getattr(library, name)())


def quanto(weights: str) -> Any:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return hf.QuantoConfig(weights=weights)


METHODS: dict[str, tuple[Callable[[], Any], bool]] = {
    "bitsandbytes-4bit": (lambda: bitsandbytes(load_in_4bit=True), True),
    "bitsandbytes-8bit": (lambda: bitsandbytes(load_in_8bit=True), True),
    "torchao-Int8WeightOnly": (lambda: torchao("Int8WeightOnlyConfig"), True),
    "torchao-Int8DynamicActivationInt8Weight": (
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        True,
    ),
    "torchao-Float8WeightOnly": (lambda: torchao("Float8WeightOnlyConfig"), True),
    "quanto-int8": (lambda: quanto("int8"), False),
    "quanto-int4": (lambda: quanto("int4"), False),
}
"""Its config, and whether transformers can save it."""
SCHEMES = ("W4A16", "W8A8", "FP8", "FP8_DYNAMIC")


def load(folder: Path, **options: Any) -> Any:
    kind = hf.AutoModelForCausalLM
    if "vision_config" in (folder / "config.json").read_text():
        kind = hf.AutoModelForImageTextToText
    return kind.from_pretrained(folder, device_map={"": "cpu"}, **options).eval()


def goes_all_the_way(model: Any, again: Any, name: str, tmp_path: Path, kind: str) -> None:
    """Calibrated, applied to itself reloaded without a warning, and exact."""
    assert view_model(model).fingerprint.quantisation == kind
    processor, _ = processor_of(name, model)
    seen = [picture(56, 56)] if name != "qwen2" else []
    samples = [
        Sample(str(i), "look", (user(*seen, words(90, i)),), reply=words(5, i)) for i in range(2)
    ]
    profile = hkvprof.calibrate(model, processor, samples, hkvprof.Recipe(budget=0.3))
    assert profile.loss[profile.loss < 1e30].max() > 0
    path = profile.save(tmp_path / "p.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hkvprof.runtime.fingerprints.warnings.warn", None)
        apply(again, path).detach()
    report = examine(again, processor if seen else None, only=CHECKS)
    failed = [f"{o.name}: {o.detail}" for o in report.outcomes if o.status.value == "failed"]
    assert failed == []


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "qwen2") for method in METHODS),
        ("bitsandbytes-4bit", "qwen2.5-vl"),
        ("torchao-Int8WeightOnly", "qwen2.5-vl"),
        ("quanto-int8", "qwen2.5-vl"),
    ],
)
def test_from_calibration_to_a_reply(method: str, name: str, tmp_path: Path) -> None:
    make, savable = METHODS[method]
    config, source = make(), tmp_path / "source"
    build_covered(name).to(torch.float32).save_pretrained(source)
    model = load(source, quantization_config=config, dtype=torch.float32)
    if savable:
        model.save_pretrained(tmp_path / "packed")
        again = load(tmp_path / "packed")
    else:
        again = load(source, quantization_config=make(), dtype=torch.float32)
    goes_all_the_way(model, again, name, tmp_path, method)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    save_compressed(build_covered("qwen2"), scheme, tmp_path)
    kind = {"W4A16": "pack", "W8A8": "int"}.get(scheme, "float")
    model, again = load(tmp_path), load(tmp_path)
    before = view_model(model).fingerprint
    model(torch.arange(3, 40)[None])  # unpacks the weights
    assert view_model(model).fingerprint == before
    goes_all_the_way(model, again, "qwen2", tmp_path, f"compressed-tensors-{kind}-quantized")


def save_compressed(model: Any, scheme: str, folder: Path) -> None:
    """A checkpoint as llm-compressor writes it, rounded to the nearest."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    said = preset_name_to_scheme(scheme, ["Linear"])
    if (said.weights.group_size or 0) > 0:
        said.weights.group_size = 32
    groups = {"group": said}
    status = "frozen"
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], quantization_status=status
    )
    apply_quantization_config(model, config)
    most = 448 if said.weights.type == "float" else 2 ** (said.weights.num_bits - 1) - 1
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            shape = layer.weight_scale.shape
            groups_of = layer.weight.detach().abs().reshape(shape.numel(), -1)
            layer.weight_scale.data.copy_((groups_of.amax(-1) / most).reshape(shape))
        if hasattr(layer, "input_scale"):
            layer.input_scale.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
