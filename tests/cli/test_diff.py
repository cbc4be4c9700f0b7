"""`hkvprof diff` and `hkvprof validate`: output and exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.cli import run
from hkvprof.models.load import model_fingerprint
from tests.profiles import make_profile

TINYVL = "profiles/tinyvl.hkv.safetensors"


def test_exit_codes_of_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_profile()
    one = str(first.save(tmp_path / "one"))
    same = str(replace(first, provenance={"other": 1}).save(tmp_path / "same"))
    changed = str(replace(first, loss=first.loss * 2).save(tmp_path / "changed"))
    assert run(["diff", one, same]) == 0
    assert "the same" in capsys.readouterr().out
    assert run(["diff", one, changed, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["arrays"] == ["loss"]
    assert run(["diff", one, TINYVL]) == 1
    assert "different models" in capsys.readouterr().err
    assert run(["diff", one, str(tmp_path / "none")]) == 1
    assert "no profile at" in capsys.readouterr().err


def test_the_identity_of_a_model_needs_no_weights() -> None:
    model, _ = hkvprof.load_model("tinyvl")
    mine = hkvprof.uniform_profile(model).fingerprint
    bare = model_fingerprint("tinyvl")
    assert bare.weights_digest == ""
    assert replace(mine, weights_digest="", hub_id="", commit="") == bare


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    """A checkpoint folder and its model."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    (tmp_path / "llama").mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", model


def test_exit_codes_of_validate(
    llama: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = llama
    file = str(uniform_profile(model).save(tmp_path / "p"))
    assert run(["validate", file]) == 0
    assert "sound profile of LlamaForCausalLM" in capsys.readouterr().out
    assert run(["validate", file, str(folder)]) == 0  # config.json alone lies there
    assert "is its model" in capsys.readouterr().out
    assert run(["validate", file, "tinyvl", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["sound"] is True
    assert any(line.startswith("architecture: ") for line in found["mismatches"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    assert run(["validate", file, str(folder)]) == 4
    assert "its config differs" in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    damaged.write_bytes(Path(file).read_bytes()[:-1])
    assert run(["validate", str(damaged)]) == 1
    assert "not a readable profile" in capsys.readouterr().err
    assert run(["validate", file, str(tmp_path / "nowhere")]) == 1


def test_shipped_profiles_are_of_their_models() -> None:
    assert run(["validate", TINYVL, "tinyvl"]) == 0
