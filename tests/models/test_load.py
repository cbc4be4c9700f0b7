"""Loading by alias, hub id and folder; every failure says what to do."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from hkvprof import load_model
from hkvprof.cli.options import advise
from hkvprof.errors import ModelError, UsageError
from hkvprof.models import load
from hkvprof.models.load import resolve_source
from hkvprof.models.sources import ALIASES, TINYVL_FOLDER


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline mode, as HF_HUB_OFFLINE=1 sets it at import, and no cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


def copy_tinyvl(folder: Path, *, without: str = "") -> Path:
    shutil.copytree(TINYVL_FOLDER, folder)
    if without:
        (folder / without).unlink()
    return folder


def test_the_embedded_model() -> None:
    model, processor = load_model("tinyvl", device="cpu")
    assert not model.training
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    configs = (model.config, model.config.text_config, model.config.vision_config)
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    assert model.device.type == "cpu"
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.bfloat16),
    ],
)
def test_the_dtype_is_honoured(dtype: Any, expected: torch.dtype) -> None:
    model, _ = load_model("tinyvl", dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_every_alias_resolves() -> None:
    for name, alias in ALIASES.items():
        assert alias.name == name
        if alias.hub_id:
            assert resolve_source(name) == alias.hub_id
            assert alias.hub_id.count("/") == 1
        else:
            assert alias.note, f"{name} has no hub id: a note must say where it comes from"
    assert resolve_source("tinyvl") == str(TINYVL_FOLDER)


def test_ids_and_folders_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source("Org/Model") == "Org/Model"
    assert resolve_source(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_source("~/model") == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen2.5-vl-7", "Did you mean qwen2.5-vl-7b"),
        ("tinyv", "Did you mean tinyvl"),
        ("zzz", "`hkvprof models` lists aliases"),
        ("./no-such-folder", "an existing folder"),
        ("/no/such/folder", "an existing folder"),
        ("a/b/c", "an existing folder"),
        ("", "expected an alias"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert str(caught.value).startswith(f"no model {name!r}: expected an alias")
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def check_three_ways(error: ModelError) -> None:
    text = str(error)
    assert text.startswith("the weights of 'qwen2.5-vl-7b' cannot be had (")
    for way in (
        "(1) a folder: --model /path/to/Qwen2.5-VL-7B-Instruct",
        "(2) the hub cache: `hf download Qwen/Qwen2.5-VL-7B-Instruct`",
        "(3) a network connection (and HF_TOKEN",
    ):
        assert way in text
    assert "\n" not in text


def test_an_alias_offline_names_three_ways(offline: None) -> None:
    with pytest.raises(ModelError) as caught:
        load_model("qwen2.5-vl-7b", device="cpu")
    check_three_ways(caught.value)


def test_a_hub_that_does_not_answer_is_not_asked_again(
    offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError("nobody is there")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ModelError) as caught:
        load_model("qwen2.5-vl-7b", device="cpu")
    check_three_ways(caught.value)
    assert asked == [("127.0.0.1", 9)], "transformers would ask for half a minute"


def test_the_hub_is_looked_for_behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(address: tuple[str, int], timeout: float) -> Connection:
        asked.append(address)
        return Connection()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(load.socket, "create_connection", connect)
    monkeypatch.setattr(load.urllib.request, "getproxies", dict)
    assert load._hub_answers()
    proxies = {"https": "http://proxy.example:3128"}
    monkeypatch.setattr(load.urllib.request, "getproxies", lambda: proxies)
    assert load._hub_answers()
    assert asked == [("huggingface.co", 443), ("proxy.example", 3128)]


def test_a_folder_without_config(tmp_path: Path) -> None:
    folder = copy_tinyvl(tmp_path / "model", without="config.json")
    with pytest.raises(ModelError) as caught:
        load_model(folder, device="cpu")
    assert str(caught.value) == (
        f"cannot load a model from {folder} (there is no config.json): expected a checkpoint "
        "written by save_pretrained, with its processor or tokenizer"
    )


@pytest.mark.parametrize("missing", ["model.safetensors", "processor_config.json"])
def test_a_folder_without_another_file(missing: str, tmp_path: Path) -> None:
    folder = copy_tinyvl(tmp_path / "model", without=missing)
    with pytest.raises(ModelError) as caught:
        load_model(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = copy_tinyvl(tmp_path / "model", without="tokenizer.json")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"turns text into nothing: expected tokenizer\.json"):
        load_model(folder, device="cpu")


def test_a_config_of_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ModelError, match="no_such_model"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file(name: str, tmp_path: Path) -> None:
    folder = copy_tinyvl(tmp_path / "model")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load a model from") as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float8", "int8", "", torch.int8])
def test_a_wrong_dtype(dtype: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown dtype .*: expected one of auto, float32"):
        load_model("tinyvl", dtype=dtype, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_wrong_device_is_refused_before_loading(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_model_class", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used here: ") as caught:
        load_model("tinyvl", device=device)
    assert "\n" not in str(caught.value)


def test_device_and_device_map_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="device or device_map, not both"):
        load_model("tinyvl", device="cpu", device_map="auto")


@pytest.mark.parametrize("name", ["out/mine", "out/", "out/mine/deep", "/mine", "mine/"])
def test_a_mistyped_folder_is_not_looked_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else learns of it: `out` is a folder here."""
    monkeypatch.setattr(load, "_hub_answers", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "other").mkdir(parents=True)
    assert resolve_source("out/other") == "out/other"
    if name == "out/":
        assert resolve_source(name) == "out"
        return
    with pytest.raises(ModelError, match=f"no model '{name}': expected an alias"):
        load_model(name)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_without_instructions_is_advised_against(
    native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for dtype, device in (
        (torch.bfloat16, "cpu"),
        (torch.float32, "cpu"),
        (torch.bfloat16, "meta"),
    ):
        advise(SimpleNamespace(dtype=dtype, device=torch.device(device)))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (0 if native else 1)
    assert native or said[0].endswith("than float32 here: --dtype float32")


@pytest.mark.parametrize("spread", ["odd", "cuda:77"])
def test_a_wrong_device_map_is_refused_before_loading(spread: str) -> None:
    with pytest.raises(UsageError, match="device map: expected one of auto, balanced"):
        load_model("tinyvl", device_map=spread)
