"""Adapters of weights: which of them the fingerprint names, and what is read through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import ModelError
from hkvprof.heads import ModelFingerprint
from hkvprof.models.adapter import view_model
from hkvprof.models.weights import require_gradients
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply
from hkvprof.samples.read import Sample
from tests.models.conversations import user
from tests.models.families import processor_of, words
from tests.models.packed import pack
from tests.models.tiny import build_covered

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings(  # peft's own
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapted(
    targets: tuple[str, ...] = ATTENTION, seed: int = 0, name: str = "qwen2", **options: Any
) -> Any:
    """A tiny model with a LoRA adapter that changes much."""
    base = build_covered(name)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=list(targets), r=4, lora_alpha=32,
        init_lora_weights=False, **options,
    )  # fmt: skip
    return peft.get_peft_model(base, config).eval()


def fingerprint(model: Any) -> ModelFingerprint:
    return view_model(model).fingerprint


def measured(model: Any) -> Profile:
    processor, _ = processor_of("qwen2", view_model(model) and model.get_base_model())
    samples = [Sample(str(i), "look", (user(words(90, i)),), reply=words(5, i)) for i in range(2)]
    return hkvprof.calibrate(model, processor, samples, hkvprof.Recipe(budget=0.3))


def test_adapters_that_run_are_named() -> None:
    base, model = fingerprint(build_covered("qwen2")), adapted()
    found = fingerprint(model)
    assert (base.adapters, found.adapters) == ((), ("default",))
    assert base.mismatches(found) == []
    assert found.weights_digest not in ("", base.weights_digest)
    assert found == fingerprint(adapted())
    assert found.weights_digest != fingerprint(adapted(seed=1)).weights_digest
    with model.disable_adapter():
        assert fingerprint(model) == base
    assert fingerprint(model) == found


@pytest.mark.parametrize("targets", [("q_proj",), ("o_proj",), ("gate_proj",)])
def test_an_adapter_anywhere_counts(targets: tuple[str, ...]) -> None:
    found = fingerprint(adapted(targets))
    assert found.adapters == ("default",)
    assert found.weights_digest != fingerprint(build_covered("qwen2")).weights_digest


def test_merged_adapters_are_told_from_unmerged_ones() -> None:
    model = adapted()
    running = fingerprint(model)
    model.merge_adapter()
    merged = fingerprint(model)
    assert merged.adapters == ("default (merged)",)
    assert merged.weights_digest != running.weights_digest
    plain = fingerprint(adapted().merge_and_unload())
    assert plain.adapters == ()
    assert plain.weights_digest == merged.weights_digest, "the same weights"
    assert merged.remarks(plain) == []
    assert running.remarks(merged) == [
        "calibrated with the adapter default, the model runs with the adapter default (merged)"
    ]
    base = fingerprint(build_covered("qwen2"))
    assert "other weights" in base.remarks(plain)[0], "merged for good: a fine-tune like any other"


def test_of_several_adapters_the_active_one_is_named() -> None:
    model = adapted()
    first = fingerprint(model)
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert fingerprint(model) == first, "it is there, but does not run"
    model.set_adapter("second")
    assert fingerprint(model).adapters == ("second",)
    model.base_model.set_adapter(["default", "second"])
    assert fingerprint(model).adapters == ("default", "second")


def test_adapters_that_transformers_holds_itself() -> None:
    model = build_covered("qwen2")
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2), adapter_name="own")
    except ValueError as error:  # a newer transformers wants a newer peft for this
        pytest.skip(str(error))
    assert fingerprint(model).adapters == ("own",)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("merge", [False, True])
def test_the_output_projection_is_what_the_layer_computes(
    options: dict[str, Any], merge: bool
) -> None:
    model = adapted(**options)
    if merge:
        model.merge_adapter()
    view = view_model(model)
    attention: Any = view.attention[1]
    heads = torch.randn(5, 64)
    expected = attention.o_proj(heads)
    torch.testing.assert_close(heads @ view.output_projection(1).T, expected)
    attention.train()
    torch.testing.assert_close(heads @ view.output_projection(1).T, expected)
    assert attention.o_proj.training


def test_packed_base_layers_under_adapters() -> None:
    base = pack(build_covered("qwen2"))
    found = fingerprint(base)
    for layer in base.model.layers:  # peft does not know these layers: wrap them as it would
        layer.self_attn.o_proj = Wrapped(layer.self_attn.o_proj)
        layer.self_attn.q_proj = Wrapped(layer.self_attn.q_proj)
    view = view_model(base)
    assert view.fingerprint.adapters == ("one",)
    assert view.fingerprint.quantisation == found.quantisation != ""
    heads = torch.randn(5, 64)
    attention: Any = view.attention[0]
    torch.testing.assert_close(heads @ view.output_projection(0).T, attention.o_proj(heads))
    require_gradients(base)


class Wrapped(torch.nn.Module):
    """A tuner layer as peft makes them."""

    adapter_layer_names = ("down", "up")
    merged_adapters: tuple[str, ...] = ()
    disable_adapters = False
    active_adapters = ("one",)

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer, self.in_features = base, base.in_features
        self.down = torch.nn.ModuleDict({"one": torch.nn.Linear(base.in_features, 4, bias=False)})
        self.up = torch.nn.ModuleDict({"one": torch.nn.Linear(4, base.out_features, bias=False)})

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.base_layer(given) + self.up["one"](self.down["one"](given))


def test_a_profile_of_an_adapted_model_knows_it(tmp_path: Path) -> None:
    model = adapted()
    path = measured(model).save(tmp_path / "p.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(build_covered("qwen2"), tmp_path / "adapter").eval()
    apply(again, path).detach()  # a warning would fail
    with pytest.warns(UserWarning, match="with the adapter default, the model runs without ad"):
        apply(build_covered("qwen2"), path).detach()
    with pytest.warns(UserWarning, match="was calibrated without adapters, the model runs with th"):
        apply(again, uniform_profile(build_covered("qwen2"))).detach()
    with pytest.warns(UserWarning, match="calibrated on other weights"):
        apply(adapted(seed=1), path).detach()


def test_losses_of_an_adapted_model_are_those_of_the_merged_one() -> None:
    model = adapted()
    running = measured(model)
    model.merge_adapter()
    merged = measured(model)
    torch.testing.assert_close(
        torch.tensor(running.output_error), torch.tensor(merged.output_error), rtol=0.02, atol=1e-4
    )


def test_adaption_prompts_are_refused() -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    model = peft.get_peft_model(build_covered("llama"), config)
    with pytest.raises(ModelError, match=r"it uses adaption prompts \(peft\)"):
        view_model(model)
