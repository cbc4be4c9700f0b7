"""Code that comes with a checkpoint or a dataset is never run, and nobody is asked whether to."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from hkvprof.cli import run
from hkvprof.errors import ModelError
from hkvprof.models.load import load_empty, load_model, model_fingerprint
from hkvprof.models.processors import load_processor
from hkvprof.models.sources import TINYVL_FOLDER
from tests.plugins.checkpoints import CHAT, save_checkpoint

ROOT = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "pipeline"}
"""Calls of transformers and datasets that may run a repository's code."""
FORBIDDEN = {"get_class_from_dynamic_module", "get_class_in_module", "custom_generate"}
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnModel",
        "AutoModelForImageTextToText": "own.OwnModel",
        "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"],
    },
    "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    "processor_config.json": {
        "AutoProcessor": "own.OwnProcessor",
        "AutoImageProcessor": ["own.OwnImages", "own.OwnImages"],
    },
}


def sources() -> list[Path]:
    return [path for name in ("hkvprof", "tools") for path in (ROOT / name).rglob("*.py")]


def name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_that_can_load_code_forbids_it(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {one.arg: one.value for one in node.keywords}
        where = f"{path}:{node.lineno}"
        assert not FORBIDDEN & {name_of(node), *given}, where
        trust = given.get("trust_remote_code")
        if name_of(node) in LOADERS or trust is not None:
            assert isinstance(trust, ast.Constant), f"{where}: pass trust_remote_code=False"
            assert trust.value is False, where


def test_the_walk_sees_the_calls() -> None:
    """Loading models, configs, tokenizers, processors and datasets is all found."""
    found = [
        name_of(node)
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and name_of(node) in LOADERS
    ]
    assert found.count("from_pretrained") >= 8
    assert {"from_config", "load_dataset"} <= set(found)


def tinyvl(folder: Path) -> Path:
    return Path(shutil.copytree(TINYVL_FOLDER, folder))


def text(folder: Path) -> Path:
    return save_checkpoint(folder, CHAT)


def with_own_code(folder: Path, names: tuple[str, ...], rename: bool) -> Path:
    """Auto maps in these files, to code that leaves a trace when it is imported; with `rename`,
    of types that transformers does not have, so that only that code could load it."""
    trace = folder.parent / "executed"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise SystemExit(7)\n")
    for name in names:
        path = folder / name
        settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        settings["auto_map"] = AUTO_MAPS[name]
        if rename and name == "config.json":
            settings |= {"model_type": "own_model", "architectures": ["OwnModel"]}
        if rename and name == "tokenizer_config.json":
            settings["tokenizer_class"] = "OwnTokenizer"
        if rename and name == "processor_config.json":
            settings["processor_class"] = "OwnProcessor"
        path.write_text(json.dumps(settings))
    return folder


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))


LOADING: list[Callable[[Path], Any]] = [
    lambda folder: load_model(folder, device="cpu"),
    load_empty,
    model_fingerprint,
]


@pytest.mark.parametrize("load", LOADING, ids=["load_model", "load_empty", "model_fingerprint"])
@pytest.mark.parametrize("make", [tinyvl, text])
def test_a_model_that_needs_its_own_code_is_refused(
    make: Callable[[Path], Path], load: Callable[[Path], Any], tmp_path: Path
) -> None:
    folder = with_own_code(make(tmp_path / "model"), ("config.json",), rename=True)
    with pytest.raises(ModelError, match=r"needs code of its own .* never runs") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (text, ("config.json", "tokenizer_config.json")),
        (tinyvl, ("config.json", "tokenizer_config.json")),
        (tinyvl, ("processor_config.json",)),
    ],
)
def test_where_transformers_has_its_own_class_that_one_is_taken(
    make: Callable[[Path], Path], names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = with_own_code(make(tmp_path / "model"), names, rename=False)
    model, processor = load_model(folder, device="cpu")
    assert type(model).__module__.startswith("transformers.")
    assert type(processor.tokenizer).__module__.startswith("transformers.")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (text, "tokenizer_config.json"),
        (tinyvl, "tokenizer_config.json"),
        (tinyvl, "processor_config.json"),
    ],
)
def test_a_tokenizer_or_processor_of_its_own_is_not_run(
    make: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    """Refused where only its own would do; some model types have one that does as well."""
    folder = with_own_code(make(tmp_path / "model"), (name,), rename=True)
    refused = make is text
    with pytest.raises(ModelError, match="needs code of its own") if refused else nullcontext():
        load_model(folder, device="cpu")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("works", [False, True])
def test_a_processor_of_its_own_is_not_blamed_on_torchvision(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason reaches the user whether torchvision is there or not."""
    import transformers

    def refuse(*_: Any, **given: Any) -> None:
        assert given["trust_remote_code"] is False
        raise ValueError("pass the argument `trust_remote_code=True` to allow custom code")

    config = transformers.AutoConfig.from_pretrained(TINYVL_FOLDER)
    config.model_type = "other"
    monkeypatch.setattr("hkvprof.models.processors.torchvision_works", lambda: works)
    monkeypatch.setattr(
        "hkvprof.models.processors.adapter_for", lambda _: type("A", (), {"pillow": ""})
    )
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_processor(str(TINYVL_FOLDER), config, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "--model", "MODEL", "--data", "DATA", "-o", "OUT"),
        ("calibrate", "--model", "MODEL", "--data", "DATA", "-o", "OUT", "--dry-run"),
        ("doctor", "MODEL"),
        ("validate", "PROFILE", "MODEL"),
        ("eval", "--model", "MODEL", "--profile", "PROFILE", "--tasks", "DATA"),
        ("certify", "PROFILE", "--model", "MODEL", "--data", "DATA", "-o", "OUT",
         "--alpha", "0.5", "--delta", "0.2"),
        ("bench", "--model", "MODEL", "--profile", "PROFILE"),
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)  # fmt: skip
def test_every_verb_says_it_in_one_line(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_own_code(text(tmp_path / "model"), ("config.json",), rename=True)
    data = tmp_path / "samples.jsonl"
    said = [{"role": "user", "content": "w5 w6"}]
    records = [{"id": f"s{i}", "task": "t", "reply": "w4", "messages": said} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, records)))
    named = {"MODEL": folder, "DATA": data, "OUT": tmp_path / "out.safetensors",
             "PROFILE": folder / "profile.safetensors"}  # fmt: skip
    code = run([str(named.get(word, word)) for word in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 1, lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert "needs code of its own" in lines[-1]
    assert not (tmp_path / "executed").exists()
