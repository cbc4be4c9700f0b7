"""Adapters of users: the example of docs/adding-a-model.md, and what registering refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hkvprof
from hkvprof.errors import HkvWarning, ModelError, UsageError
from hkvprof.heads import HeadGrid
from hkvprof.models import Adapter, architectures, register_adapter
from hkvprof.models.adapter import view_model
from hkvprof.samples.read import Sample
from tests.models.conversations import user
from tests.models.families import processor_of, words
from tests.models.tiny import build_covered
from tests.models_for_tests import apply

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_ADAPTERS", dict(architectures._ADAPTERS))


@pytest.fixture
def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **ids)).eval()


def example() -> str:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1
    return code[0]


def test_the_example_is_short() -> None:
    assert len(example().splitlines()) < 30


def test_the_example_is_needed(gpt2: Any) -> None:
    with pytest.raises(ModelError, match=r"no supported layer 0: no attention .*adding-a-model.md"):
        view_model(gpt2)


def test_the_example_works_from_calibrate_to_generate(gpt2: Any) -> None:
    exec(example(), {})
    view = view_model(gpt2)
    assert not view.generic
    assert view.grid == HeadGrid(layers=2, query_heads=4, kv_heads=4, head_dim=16)
    processor, _ = processor_of("gpt2", gpt2)
    messages = [user(words(90, i)) for i in range(2)]
    samples = [Sample(str(i), "t", (m,), reply=words(5, i)) for i, m in enumerate(messages)]
    with pytest.warns(HkvWarning, match="scored by the prompt's last rows alone"):
        profile = hkvprof.calibrate(gpt2, processor, samples, hkvprof.Recipe(budget=0.2))
    inputs = processor.encode([messages[:1]]).to(gpt2.device, gpt2.dtype)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "min_new_tokens": 4}
    dense = gpt2.generate(**inputs, **options).logits
    with apply(gpt2, profile, budget=1.0):
        whole = gpt2.generate(**inputs, **options).logits
    assert all(torch.equal(a, b) for a, b in zip(dense, whole, strict=True))
    with apply(gpt2, profile) as handle:
        pruned = gpt2.generate(**inputs, **options).logits
        assert handle.receipt().compressed_layers == 2
        assert handle.receipt().resident_share <= 0.2 + 3 / 94 + 1 / 32, "3 new tokens, and slack"
    assert torch.equal(pruned[0], dense[0]), "the prompt is attended to densely"
    assert not torch.equal(pruned[1], dense[1])


def test_the_examples_projection_is_the_modules(gpt2: Any) -> None:
    """What an attention module returns is W_O times its heads' outputs, plus the bias."""
    exec(example(), {})
    attention, heads = gpt2.transformer.h[0].attn, torch.randn(5, 64)
    with torch.no_grad():
        expected = attention.c_proj(heads) - attention.c_proj.bias
        found = heads @ view_model(gpt2).output_projection(0).T
    assert torch.allclose(expected, found, atol=1e-5)


def test_an_architecture_without_adapter_is_generic() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = hf.GraniteForCausalLM(
        hf.GraniteConfig(
            **sizes, num_attention_heads=4, vocab_size=128, pad_token_id=0, eos_token_id=2
        )
    )
    assert view_model(model).generic
    assert type(view_model(model).adapter) is Adapter


def test_an_own_adapter_can_refuse_and_replace() -> None:
    class Strict(Adapter):
        model_types = ("llama", "mine")

        def refusal(self, model: Any) -> str:
            return "it is not wanted here"

    with pytest.raises(UsageError, match="llama has an adapter already: pass replace=True"):
        register_adapter(Strict())
    assert not view_model(build_covered("llama")).generic, "nothing was registered"
    register_adapter(Strict(), replace=True)
    with pytest.raises(ModelError, match="llama is not supported: it is not wanted here"):
        view_model(build_covered("llama"))


@pytest.mark.parametrize("wrong", [Adapter(), Adapter, "llama"])
def test_what_cannot_be_registered(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"expected an instance .* that names its model_types"):
        register_adapter(wrong)
