"""GGUF files: the model that was written, its tokenizer, and refusals in one sentence."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hkvprof import load_model
from hkvprof.errors import ModelError
from hkvprof.lazy import install_hint
from hkvprof.models.adapter import view_model
from hkvprof.models.gguf_file import ensure_checkpoint
from hkvprof.models.load import load_empty, model_fingerprint
from tests.models import ggufs

if importlib.util.find_spec("gguf") is None:
    pytest.skip(f"gguf not installed: {install_hint('gguf')}", allow_module_level=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any) -> torch.Tensor:
    """Of a fixed prompt."""
    with torch.no_grad():
        return torch.Tensor(model(torch.arange(40)[None] * 5).logits)


def refused(file: Path, *words: str) -> None:
    """Loading `file` is refused in one sentence with these words; nothing is left."""
    with pytest.raises(ModelError) as caught:
        load_model(file)
    text = str(caught.value)
    assert all(word in text for word in (str(file), *words)), text
    assert "\n" not in text
    assert "model.gguf" not in text.replace(str(file), "")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_K"])
def test_logits_are_those_of_the_model_built_directly(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    file = tmp_path / f"x-{kind}.GGUF"
    direct = ggufs.write(file, architecture, kind)
    model, processor = load_model(file, device="cpu")
    assert torch.equal(logits(model), logits(direct))
    assert view_model(model).fingerprint.weights_digest
    mine, theirs = view_model(model).fingerprint, view_model(direct).fingerprint
    assert mine.weights_digest == theirs.weights_digest
    assert (mine.grid, mine.rope, mine.quantisation) == (theirs.grid, theirs.rope, "")
    assert model.dtype == torch.float32
    assert processor.tokenizer.eos_token == "<|im_end|>"


def test_a_file_is_known_without_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    direct = ggufs.write(file, "qwen2", "Q8_0")
    known = model_fingerprint(file)
    assert not known.weights_digest
    assert not known.mismatches(view_model(direct).fingerprint)
    assert next(load_empty(file)[0].parameters()).device.type == "meta"


def test_a_file_is_converted_once_wherever_it_lies(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ggufs.write(tmp_path / "x.gguf", "llama")
    folder = ensure_checkpoint(tmp_path / "x.gguf")
    (tmp_path / "deep").mkdir()
    shutil.copy(tmp_path / "x.gguf", tmp_path / "deep" / "y.gguf")
    monkeypatch.setattr("hkvprof.models.gguf_file._convert", lambda *_: pytest.fail("again"))
    assert ensure_checkpoint(tmp_path / "deep" / "y.gguf") == folder
    assert list(cache.iterdir()) == [folder]


def test_one_changed_weight_is_another_model(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    ggufs.write(file, "llama")
    before = ensure_checkpoint(file)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # the last element of the last matrix, in a file of the same size
    file.write_bytes(data)
    after = ensure_checkpoint(file)
    assert before != after


def test_what_lies_beside_the_file_is_not_its_own(tmp_path: Path) -> None:
    direct = ggufs.write(tmp_path / "x.gguf", "llama")
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"model_type": "qwen3", "base_model_name_or_path": "a/b"}')
    model, _ = load_model(tmp_path / "x.gguf", device="cpu")
    assert torch.equal(logits(model), logits(direct))


# -- tokenizers -----------------------------------------------------------------------------------


def tokenizer(tmp_path: Path, **fields: Any) -> Any:
    """The tokenizer of a file with these fields."""
    ggufs.write(tmp_path / "x.gguf", "llama", **fields)
    return load_model(tmp_path / "x.gguf", device="cpu")[1].tokenizer


@pytest.mark.parametrize(
    "text", ["the 12 café 🙂\n\n\tß'LL", "  naïve 東京<tool> -- <|im_end|>", ""]
)
@pytest.mark.parametrize("pre", ["qwen2", "smollm", "gpt-2"])
def test_text_comes_back(tmp_path: Path, pre: str, text: str) -> None:
    made = tokenizer(tmp_path, pre=pre)
    assert made.decode(made.encode(text)) == text
    assert len(made) == len(ggufs.vocabulary())


def test_digits_are_split_as_the_file_says(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, pre="gpt-2").tokenize(" the 12") == ["Ġthe", "Ġ", "12"]
    assert tokenizer(tmp_path, pre="smollm").tokenize(" the 12") == ["Ġthe", "Ġ", "1", "2"]
    assert tokenizer(tmp_path, pre="qwen2").tokenize(" the 12") == ["Ġthe", "Ġ", "1", "2"]


def test_special_tokens(tmp_path: Path) -> None:
    made = tokenizer(tmp_path)
    tokens = ggufs.vocabulary()
    turn = [tokens.index(t) for t in ("<|im_start|>", "u", "<tool>", "<|im_end|>")]
    assert made.encode("<|im_start|>u<tool><|im_end|>") == turn
    assert made.decode(turn, skip_special_tokens=True) == "u<tool>"
    assert (made.bos_token, made.eos_token) == ("<|endoftext|>", "<|im_end|>")
    chat = made.apply_chat_template(
        [{"role": "user", "content": "he"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"


def test_a_first_token_only_where_the_file_asks_for_it(tmp_path: Path) -> None:
    first = ggufs.vocabulary().index("<|endoftext|>")
    assert first not in tokenizer(tmp_path).encode("he")
    assert tokenizer(tmp_path, add_bos_token=True).encode("he")[0] == first


def test_qwen_composes_characters(tmp_path: Path) -> None:
    made = tokenizer(tmp_path, pre="qwen2")
    assert made.encode("e\u0301") == made.encode("\u00e9")


# -- refusals -------------------------------------------------------------------------------------


def test_an_unknown_way_to_split_text_is_refused(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "x.gguf", "llama", pre="somebody's own")
    refused(tmp_path / "x.gguf", "somebody's own", "its tokens would be wrong")


def test_no_file_and_no_gguf(tmp_path: Path, cache: Path) -> None:
    refused(tmp_path / "none.gguf", "expected a GGUF file", "No such file")
    for content in (b"", b"GG", b"PK\3\4" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        refused(tmp_path / "x.gguf", "is no GGUF file")
    assert not cache.exists()


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.99, 0.99999])
def test_a_file_cut_short_is_refused(tmp_path: Path, cache: Path, share: float) -> None:
    file = tmp_path / "x.gguf"
    ggufs.write(file, "qwen2", "Q8_0")
    data = file.read_bytes()
    file.write_bytes(data[: max(4, int(len(data) * share))])
    refused(file, "cut short or damaged", "copy it again")
    assert list(cache.iterdir()) == []


def test_damage_anywhere_in_the_head_is_refused_or_harmless(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    ggufs.write(file, "llama")
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    said = []
    for place in random.integers(4, 1200, 12):
        data = bytearray(whole)
        data[place] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
        try:
            ensure_checkpoint(file)
        except ModelError as error:
            said.append(str(error))
    assert len(said) >= 3
    assert all(str(file) in text and "\n" not in text for text in said), said


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    ggufs.write(file, "llama")
    file.write_bytes(file.read_bytes().replace(b"llama", b"lumma"))
    refused(file, "lumma", "cannot read", "save_pretrained")


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    ggufs.write(file, "llama")
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_k.weight", b"blk.1.attn_z.weight"))
    refused(file, "lacks 1 of the model's weights", "model.layers.1.self_attn.k_proj.weight")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"split__count": 3}, "one part of several"),
        ({"llama__rope__scaling__type": "yarn"}, "scales its positions"),
        ({"model": None}, "holds no tokenizer"),
    ],
)
def test_what_would_be_read_wrongly(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    ggufs.write(tmp_path / "x.gguf", "llama", **fields)
    refused(tmp_path / "x.gguf", words)
