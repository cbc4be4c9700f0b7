"""Quantised weights: their names, what is read of them, and the way from calibration to a reply."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.doctor.examine import examine
from hkvprof.errors import ModelError, ProfileError
from hkvprof.models.adapter import view_model
from hkvprof.models.load import _empty_model
from hkvprof.models.outline import outline
from hkvprof.models.quantised import quantisation_of, untested
from hkvprof.models.weights import (
    effective_weight,
    passes_gradients,
    passing_gradients,
    require_gradients,
    rounds_activations,
)
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply
from hkvprof.samples.read import Sample
from tests.models.conversations import user
from tests.models.families import processor_of, words
from tests.models.packed import CurvedLinear, PackedLinear, RoundingLinear, dequantise, pack
from tests.models.tiny import build_covered

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def packed(kind: type[PackedLinear] = PackedLinear, name: str = "qwen2") -> Any:
    """A model of packed layers whose checkpoint says that it is a tested method's."""
    model = build_covered(name)
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias, std=5.0)  # Qwen2's can be large
    model = pack(model, kind)
    model.config.quantization_config = GPTQ
    return model


def plain() -> Any:
    model = build_covered("qwen2")
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias, std=5.0)
    return dequantise(model)


def measured(model: Any, recipe: str = "measured") -> Profile:
    processor, _ = processor_of("qwen2", model)
    samples = [Sample(str(i), "look", (user(words(90, i)),), reply=words(5, i)) for i in range(2)]
    return hkvprof.calibrate(model, processor, samples, hkvprof.Recipe(recipe, budget=0.3))  # type: ignore[arg-type]


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes-4bit"),
        ({"quant_method": "bitsandbytes", "_load_in_8bit": True}, "bitsandbytes-8bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "awq", "bits": 4}, "awq-4bit"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto-int8"),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}},
            },
            "torchao-Int8WeightOnly",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors-pack-quantized",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm-fp8"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"bits": 4}, "unnamed"),
        ({}, ""),
    ],
)
@pytest.mark.parametrize("wrap", [dict, lambda said: said and SimpleNamespace(**said)])
def test_methods_are_named_by_the_checkpoint(said: dict[str, Any], name: str, wrap: Any) -> None:
    model = build_covered("llama")
    model.config.quantization_config = wrap(said)
    assert quantisation_of(model, []) == name


def test_methods_are_named_by_the_layers_of_a_model_quantised_later() -> None:
    model = pack(build_covered("llama"))
    assert view_model(model).fingerprint.quantisation == "tests-PackedLinear"
    assert view_model(build_covered("llama")).fingerprint.quantisation == ""


# -- what is read -------------------------------------------------------------------------------


def test_packed_weights_are_read_as_the_dequantised_ones() -> None:
    mine, theirs = view_model(packed()), view_model(plain())
    assert mine.fingerprint.weights_digest == theirs.fingerprint.weights_digest != ""
    assert mine.fingerprint.mismatches(theirs.fingerprint) == []
    for layer in range(mine.grid.layers):
        assert torch.equal(mine.output_projection(layer), theirs.output_projection(layer))
        for ours, plain_one in zip(
            mine.attention[layer].children(), theirs.attention[layer].children(), strict=True
        ):
            assert torch.equal(effective_weight(ours), plain_one.weight)


def test_reading_leaves_the_layers_alone() -> None:
    model = packed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    view_model(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_at_hand_have_no_digest() -> None:
    assert view_model(packed().to("meta")).fingerprint.weights_digest == ""


def test_layers_that_do_not_run_here_are_named() -> None:
    class Broken(PackedLinear):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel image is available\nfor this device")

    with pytest.raises(ModelError, match=r"Broken cannot be read on this machine \(no kernel"):
        view_model(packed(Broken))


# -- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PackedLinear, RoundingLinear])
def test_gradients_are_those_of_the_dequantised_weights(kind: type[PackedLinear]) -> None:
    model = packed(kind)
    layer = model.model.layers[0].mlp.down_proj
    given = torch.randn(3, layer.in_features, requires_grad=True)
    bare = layer(given)
    assert not passes_gradients(layer)
    with passing_gradients(model):
        answer = layer(given)
        assert torch.equal(answer, bare)
        slope = torch.randn_like(answer)
        answer.backward(slope)
    assert given.grad is not None
    torch.testing.assert_close(given.grad, slope @ layer.dequantised())
    assert not layer._forward_hooks


def test_calibration_finds_what_it_finds_on_the_dequantised_model() -> None:
    mine, theirs = measured(packed()), measured(plain())
    np.testing.assert_allclose(mine.loss, theirs.loss, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mine.output_error, theirs.output_error, rtol=1e-3, atol=1e-6)
    assert mine.fingerprint.quantisation == "gptq-4bit"


def test_layers_that_are_not_linear_are_refused_by_name() -> None:
    model = packed(CurvedLinear)
    with pytest.raises(ModelError, match=r"CurvedLinear have no usable gradients"):
        measured(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert measured(model, recipe="paper").recipe == "paper", "it reads prompts alone"


def test_rounded_activations_are_found_and_their_logits_not_compared() -> None:
    assert not rounds_activations(packed())
    assert not rounds_activations(packed().to(torch.bfloat16))
    assert not rounds_activations(build_covered("qwen2"))
    model = packed(RoundingLinear)
    assert rounds_activations(model)
    (outcome,) = examine(model, only=["masked-logits"]).outcomes
    assert (outcome.status.value, "not compared" in outcome.detail) == ("passed", True)


def test_plain_models_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hkvprof.models.weights.passes_gradients", None)
    require_gradients(build_covered("qwen2"))


# -- apply --------------------------------------------------------------------------------------


def test_a_packed_model_is_exact_and_knows_its_profile(tmp_path: Path) -> None:
    model = packed()
    report = examine(model, only=["text", "batch", "turns", "masked-text", "masked-batch"])
    assert [outcome.name for outcome in report.outcomes if outcome.status.value != "passed"] == []
    path = measured(model).save(tmp_path / "p.safetensors")
    apply(packed(), path).detach()  # a warning would fail
    with pytest.warns(UserWarning, match=r"on quantised weights \(gptq-4bit\), the model has unq"):
        apply(build_covered("qwen2"), path).detach()
    with pytest.warns(UserWarning, match=r"on unquantised weights, the model has quantised weigh"):
        apply(model, uniform_profile(build_covered("qwen2"))).detach()


def test_untested_methods_are_refused_until_the_doctor_has_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path))
    model = packed()
    profile = uniform_profile(model)
    model.config.quantization_config = {"quant_method": "aqlm"}
    named = r"quantised weights of this kind \(aqlm\) were not tested with hkvprof, and it has not"
    with pytest.raises(ModelError, match=named):
        apply(model, profile)
    with pytest.raises(ModelError, match=named):
        measured(model)
    report = examine(model)
    assert Path(report.approved).is_file()
    apply(model, profile).detach()
    model.config.quantization_config = {"quant_method": "vptq"}
    with pytest.raises(ModelError, match=r"\(vptq\) were not tested"):
        apply(model, profile)


def test_weights_that_were_dequantised_when_loaded_need_no_test() -> None:
    model = build_covered("qwen2")
    model.config.quantization_config = {"quant_method": "fp8"}
    assert view_model(model).unproven == ""


def test_eight_bit_floats_in_plain_tensors_are_kernels_of_their_own() -> None:
    layer = torch.nn.Linear(32, 32, dtype=torch.float8_e4m3fn, device="meta")
    assert untested("fp8", [layer]) == "fp8, multiplied in FP8"
    assert untested("compressed-tensors-float-quantized", [layer]).endswith("in FP8")


def test_quantised_caches_are_refused() -> None:
    model = build_covered("llama")
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8},
    }
    with pytest.raises(ModelError, match=r"quantises keys and values too \(kv_cache_scheme\)"):
        view_model(model)


# -- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "bits"),
    [
        (GPTQ, 4 + 16 / 128),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "fp8", "dequantize": True}, 16),
        ({"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig"}, 4),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4}}},
            },
            4,
        ),
        ({"quant_method": "something"}, 16),
    ],
)
def test_weight_bytes_of_a_checkpoint(said: dict[str, Any], bits: float, tmp_path: Path) -> None:
    model = build_covered("llama").to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16", "quantization_config": said})
    )
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    rest = sum(p.numel() for n, p in model.named_parameters() if "proj" not in n)
    assert outline(_empty_model(str(tmp_path), True)).weight_bytes == linear * bits / 8 + 2 * rest


def test_layers_that_the_checkpoint_leaves_alone_count_whole() -> None:
    model = build_covered("llama")
    whole = outline(model).weight_bytes
    model.config.quantization_config = {**GPTQ, "modules_to_not_convert": ["mlp", "self_attn"]}
    assert outline(model).weight_bytes == whole


# -- profiles -----------------------------------------------------------------------------------


def test_the_profile_says_it_only_where_there_is_something_to_say(tmp_path: Path) -> None:
    profile = uniform_profile(build_covered("qwen2"))
    assert not {"quantisation", "adapters"} & profile.fingerprint.to_json().keys()
    said = replace(profile.fingerprint, quantisation="awq-4bit", adapters=("a", "b (merged)"))
    path = replace(profile, fingerprint=said).save(tmp_path / "p.safetensors")
    assert hkvprof.load_profile(path).fingerprint == said


@pytest.mark.parametrize(
    "changes",
    [
        {"quantisation": 4}, {"quantisation": "x" * 1025}, {"quantisation": "a\nb"},
        {"adapters": ("a",) * 65}, {"adapters": ("a\x00",)}, {"adapters": (1,)},
    ],
)  # fmt: skip
def test_what_a_profile_may_say_is_bounded(changes: dict[str, Any]) -> None:
    profile = uniform_profile(build_covered("qwen2"))
    with pytest.raises(ProfileError, match=f"fingerprint.{next(iter(changes))} must be"):
        replace(profile, fingerprint=replace(profile.fingerprint, **changes))
