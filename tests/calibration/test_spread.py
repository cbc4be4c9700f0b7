"""Models whose weights do not lie in their modules: offloaded by accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hkvprof
from hkvprof.calibration.calibrate import calibrate
from hkvprof.calibration.recipe import Recipe
from hkvprof.models.adapter import view_model
from hkvprof.samples.read import Sample
from tests.plugins.checkpoints import CHAT, save_checkpoint, words

pytest.importorskip("accelerate", reason="accelerate is not installed")

PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
MAPS: dict[str, Any] = {
    "auto": "auto",
    "cpu": {"": "cpu"},
    "two layers on disk": {
        **dict.fromkeys(PARTS, "cpu"),
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), CHAT)


@pytest.mark.parametrize("name", MAPS)
def test_a_device_map_changes_no_byte(
    checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DISABLE_RICH", "1")
    samples = [
        Sample(f"s{i}", "t", ({"role": "user", "content": words(40 + i, i)},), words(4, i + 9))
        for i in range(2)
    ]
    plain, processor = hkvprof.load_model(checkpoint, device="cpu")
    spread, _ = hkvprof.load_model(checkpoint, device_map=MAPS[name])
    last = view_model(spread).attention[-1]
    assert last.o_proj.weight.is_meta == (name == "two layers on disk")
    view = view_model(plain)
    projection = view.output_projection(len(view.attention) - 1)
    assert bool((view.adapter.output_projection(last) == projection).all())
    assert last.o_proj.weight.is_meta == (name == "two layers on disk")
    recipe = Recipe(budget=0.3)
    profiles = [calibrate(model, processor, samples, recipe) for model in (plain, spread)]
    assert profiles[0].to_bytes() == profiles[1].to_bytes()
