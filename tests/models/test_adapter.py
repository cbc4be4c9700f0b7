"""What hkvprof reads of a model: geometry, fingerprint, and whom it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hkvprof.errors import ModelError
from hkvprof.heads import HeadGrid
from hkvprof.models.adapter import view_model
from hkvprof.models.architectures import Adapter
from hkvprof.models.load import load_model
from hkvprof.models.sources import TINYVL_FOLDER
from tests.models.tiny import COVERED, REFUSED, SLIDING, TEXT, build, build_covered
from tests.models_for_tests import random_llama


@pytest.fixture(scope="module")
def tinyvl() -> Any:
    return load_model("tinyvl", dtype="float32", device="cpu")[0]


def test_the_embedded_model(tinyvl: Any) -> None:
    view = view_model(tinyvl)
    text = tinyvl.config.text_config
    assert view.grid == HeadGrid(
        layers=text.num_hidden_layers,
        query_heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
    )
    assert view.layer_ids == tuple(range(text.num_hidden_layers))
    assert view.text_config is text
    layers = tinyvl.model.language_model.layers
    assert all(a is b.self_attn for a, b in zip(view.attention, layers, strict=True))


def test_its_fingerprint(tinyvl: Any) -> None:
    fingerprint = view_model(tinyvl).fingerprint
    assert fingerprint.architecture == "Qwen2_5_VLForConditionalGeneration"
    assert fingerprint.rope["mrope_section"] == [4, 6, 6]
    assert fingerprint.vision["spatial_merge_size"] == 2
    assert fingerprint.vision["image_token_id"] == tinyvl.config.image_token_id
    assert len(fingerprint.config_hash) == len(fingerprint.weights_digest) == 16
    assert fingerprint.mismatches(fingerprint) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_fingerprint_does_not_depend_on_the_dtype(tinyvl: Any, dtype: str) -> None:
    other, _ = load_model("tinyvl", dtype=dtype, device="cpu")
    assert view_model(other).fingerprint == view_model(tinyvl).fingerprint


def test_the_config_hash_is_pinned(tinyvl: Any) -> None:
    """Profiles carry it: it must not change with the release of transformers."""
    assert view_model(tinyvl).fingerprint.config_hash == "25468417ed4926d3"


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_the_digest_covers_every_projection(name: str) -> None:
    model = build_covered("qwen2")
    before = view_model(model).fingerprint
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, name).weight.mul_(1.5)
    after = view_model(model).fingerprint
    assert after.weights_digest != before.weights_digest
    assert after.config_hash == before.config_hash
    assert before.mismatches(after) == [], "a fine-tune warns, it is not another model"


@pytest.mark.parametrize(("part", "changes"), [(0, True), (1, True), (2, True), (None, False)])
def test_the_digest_covers_a_fused_projection(part: int | None, changes: bool) -> None:
    model = build_covered("phi3")
    before = view_model(model).fingerprint.weights_digest
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        if part is None:
            attention.o_proj.weight.mul_(1.5)
        else:
            attention.qkv_proj.weight.split([64, 32, 32])[part].mul_(1.5)
    assert (view_model(model).fingerprint.weights_digest != before) is changes


def test_weights_that_are_not_at_hand_have_no_digest() -> None:
    with torch.device("meta"):
        model = build_covered("llama")
    assert view_model(model).fingerprint.weights_digest == ""


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_hidden_layers": 3}, "grid.layers: 2 != 3"),
        ({"num_attention_heads": 8}, "grid.query_heads: 4 != 8"),
        ({"num_key_value_heads": 4}, "grid.kv_heads: 2 != 4"),
        ({"head_dim": 32}, "grid.head_dim: 16 != 32"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope.rope_theta: 10000.0 != 500.0",
        ),
    ],
)
def test_mismatches_are_named(changes: dict[str, Any], field: str) -> None:
    mine = view_model(build_covered("llama")).fingerprint
    assert mine.mismatches(view_model(build_covered("llama", **changes)).fingerprint) == [field]


def test_another_architecture_and_vision_geometry_are_mismatches() -> None:
    qwen2, qwen3 = (view_model(build_covered(n)).fingerprint for n in ("qwen2-vl", "qwen3-vl"))
    named = [text.split(":")[0] for text in qwen2.mismatches(qwen3)]
    assert named == ["architecture", "vision.patch_size"]


def test_other_sizes_change_the_config_hash_alone() -> None:
    mine = view_model(build_covered("llama")).fingerprint
    wider = view_model(build_covered("llama", intermediate_size=96)).fingerprint
    assert mine.mismatches(wider) == []
    assert mine.config_hash != wider.config_hash


def test_sliding_layers_are_not_covered() -> None:
    model = build_covered("gemma3")
    view = view_model(model)
    assert view.layer_ids == (1, 3)
    assert view.grid.layers == 2
    assert [module.layer_idx for module in view.attention] == [1, 3]
    assert "full_attention.rope_theta" in view.fingerprint.rope, "RoPE per layer type is compared"


@pytest.mark.parametrize("name", COVERED)
def test_every_covered_model_has_an_output_projection(name: str) -> None:
    view = view_model(build_covered(name))
    for layer in range(view.grid.layers):
        hidden, heads = view.output_projection(layer).shape
        assert heads == view.grid.query_heads * view.grid.head_dim
        assert hidden == TEXT["hidden_size"]


def test_an_attention_without_output_projection() -> None:
    with pytest.raises(ModelError, match="Linear has no output projection named o_proj"):
        Adapter().output_projection(nn.Linear(2, 2))


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused_by_name(name: str) -> None:
    config, model, arguments, message = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        view_model(build(config, model, arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sinks_are_found_in_the_modules() -> None:
    model = build_covered("llama")
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ModelError, match="llama is not supported: it uses learned attention sinks"):
        view_model(model)


def test_shared_keys_and_values_are_refused() -> None:
    model = build_covered("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ModelError, match="layers that share one layer's keys and values"):
        view_model(model)


def test_layers_of_different_geometry_are_refused() -> None:
    model = build_covered("llama")
    model.model.layers[1].self_attn.head_dim = 8
    with pytest.raises(ModelError, match=r"different head widths \(\[8, 16\]\)"):
        view_model(model)


def test_something_that_is_no_generation_model() -> None:
    with pytest.raises(ModelError, match="expected a transformers generation model, found Linear"):
        view_model(nn.Linear(2, 2))


def test_a_model_of_sliding_layers_only_says_so() -> None:
    changes = {**SLIDING, "num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}
    model = build("Gemma3TextConfig", "Gemma3ForCausalLM", {**TEXT, **changes})
    with pytest.raises(ModelError, match="expected decoder layers with full attention"):
        view_model(model)


# -- where a model came from --------------------------------------------------------------------


def origin(model: Any, name: str, commit: str | None) -> tuple[str, str]:
    model.name_or_path = name
    model.config._commit_hash = commit
    fingerprint = view_model(model).fingerprint
    return fingerprint.hub_id, fingerprint.commit


def test_a_hub_model_is_named_with_its_commit() -> None:
    assert origin(build_covered("llama"), "Org/Model-1.5", "1" * 40) == ("Org/Model-1.5", "1" * 40)


@pytest.mark.parametrize(
    "name", ["/home/someone/model", "./org/model", "~/model", "models/llama", "C:\\m/x", "llama"]
)
def test_a_folder_is_not_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    model = build_covered("llama")
    assert origin(model, name, "1" * 40) == ("", "")
    assert origin(model, name, None) == ("", "")


def test_a_folder_that_is_gone_is_not_named() -> None:
    """Only the hub gives commits."""
    assert origin(build_covered("llama"), "models/llama", None) == ("", "")


def test_no_path_of_this_machine_is_in_a_real_fingerprint(tinyvl: Any) -> None:
    fingerprint = view_model(tinyvl).fingerprint
    assert str(TINYVL_FOLDER) not in str(fingerprint.to_json())
    assert (fingerprint.hub_id, fingerprint.commit) == ("", "")
    assert SimpleNamespace(**fingerprint.to_json()).architecture == fingerprint.architecture


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_models_split_over_processes_by_heads_or_layers_are_refused(kind: str) -> None:
    model = random_llama()
    sizes = {"tp_size": 1, "pp_size": 1, "fsdp_size": 4}
    model.config.distributed_config = SimpleNamespace(**sizes)
    assert view_model(model).grid.layers == 3
    model.config.distributed_config = SimpleNamespace(**{**sizes, f"{kind[0]}p_size": 2})
    with pytest.raises(ModelError, match=f"{kind} parallelism"):
        view_model(model)
