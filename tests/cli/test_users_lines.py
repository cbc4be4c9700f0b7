"""The lines that a user types first, against a hub that serves a tiny Qwen2.5-VL as the 7B one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from huggingface_hub import constants

import hkvprof.runtime
from hkvprof import load_model
from hkvprof.cli import run
from hkvprof.models.sources import ALIASES, TINYVL_FOLDER
from tests.models.conversations import picture, user
from tests.profile.loopback_hub import LoopbackHub, asked_hub

NAME = "qwen2.5-vl-7b"
HUB_ID = ALIASES[NAME].hub_id


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The embedded Qwen2.5-VL as a repository has it: weights in shards, processor, template."""
    folder = tmp_path_factory.mktemp("repository")
    model = transformers.AutoModelForImageTextToText.from_pretrained(TINYVL_FOLDER)
    model.save_pretrained(folder, max_shard_size="4MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    beside = {p.name: p for p in TINYVL_FOLDER.iterdir() if p.suffix != ".safetensors"}
    made = {p.name: p for p in folder.iterdir()}
    return {name: path.read_bytes() for name, path in {**beside, **made}.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty hub that is asked for models, and an empty cache."""
    with asked_hub(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.chdir(tmp_path)
        yield hub


def calib() -> None:
    """Four samples with pictures."""
    Path("calib").mkdir()
    lines = []
    for number in range(4):
        picture(112, 112, number).save(f"calib/{number}.png")
        parts = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "how many"}]
        line = {
            "id": str(number),
            "task": "count",
            "messages": [{"role": "user", "content": parts}],
            "reply": "two",
        }
        lines.append(json.dumps(line))
    Path("calib/samples.jsonl").write_text("\n".join(lines))


def test_the_users_lines(
    hub: LoopbackHub,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calib()
    hub.create(HUB_ID)
    commit = hub.commit(HUB_ID, files)
    line = ["calibrate", "--model", NAME, "--data", "calib/"]
    more = ["--dtype", "fp32", "--device", "cpu", "-o", "profile.safetensors"]

    *arrived, hub.broken = sorted(name for name in files if name.endswith(".safetensors"))
    assert run([*line, *more]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert any(asked.endswith(".safetensors") for asked in hub.asked)
    assert not Path("profile.safetensors").exists()

    hub.asked.clear()
    hub.broken = ""
    assert run([*line, *more]) == 0, capsys.readouterr().err
    fetched = [asked for asked in hub.asked if asked.startswith("GET ")]
    assert not any(name in asked for asked in fetched for name in arrived), "fetched twice"
    out = capsys.readouterr().out
    assert f"hkvprof doctor {NAME} profile.safetensors" in out

    assert run(["inspect", "profile.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "model: Qwen2_5_VLForConditionalGeneration, 6 layers" in out
    assert f"source: {HUB_ID} {commit}" in out

    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run([*line, *more, "--force"]) == 0, capsys.readouterr().err
    model, processor = load_model(NAME, dtype="float32", device="cpu")
    assert hub.asked == [], "offline asks nobody"
    with hkvprof.runtime.apply(model, "profile.safetensors") as handle:
        inputs = processor.encode([[user(picture(112, 112, 9), "how many disc")]])
        model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=4)
        assert handle.receipt().profile == "profile.safetensors"


@pytest.mark.parametrize(
    ("gated", "says"),
    [(True, f"{HUB_ID} is gated: accept its terms"), (False, "the hub has no model")],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(
    gated: bool, says: str, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    calib()
    if gated:
        hub.create(HUB_ID)
        hub.gated.add(HUB_ID)
    assert run(["calibrate", "--model", NAME, "--data", "calib/"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot load '{NAME}': ")
    assert says in error
    assert "Traceback" not in error
