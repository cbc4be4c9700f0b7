"""Random models of published shapes; limits read from configs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hkvprof.errors import UsageError
from hkvprof.models import shapes
from hkvprof.models.adapter import view_model
from hkvprof.models.outline import context_limit, sizes_of, vocabulary
from hkvprof.models.shapes import SHAPES, VOCABULARY, build_shape
from tests.models_for_tests import random_llama

SMALL = replace(SHAPES["qwen2.5-vl-7b"], hidden=64, mlp=96)


def test_the_published_sizes() -> None:
    shape = SHAPES["qwen2.5-vl-7b"]
    assert (shape.query_heads, shape.kv_heads, shape.head_dim) == (28, 4, 128)
    assert (shape.hidden, shape.mlp) == (3584, 18944)
    # 28 layers of it, the embedding and the output projection are the 7.6 billion of its name
    assert 28 * shape.layer_parameters + 2 * 152_064 * 3584 == pytest.approx(7.6e9, rel=0.01)


def test_a_shape_becomes_a_model_of_the_real_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "small", replace(SMALL, hidden=28 * 8, head_dim=8,
                                                        mrope_section=(1, 1, 2)))  # fmt: skip
    default = torch.get_default_dtype()
    state = torch.random.get_rng_state()
    model = build_shape("small", 3, "auto", "cpu")
    assert torch.get_default_dtype() == default
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    grid = view_model(model).grid
    assert (grid.layers, grid.query_heads, grid.kv_heads, grid.head_dim) == (3, 28, 4, 8)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert (context_limit(model), vocabulary(model)) == (128_000, VOCABULARY)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 20)[None]).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    ("name", "layers", "dtype", "device", "words"),
    [("none", 1, "auto", "cpu", "unknown shape 'none': expected qwen2.5-vl-7b"),
     ("qwen2.5-vl-7b", 0, "auto", "cpu", "at least 1"),
     ("qwen2.5-vl-7b", 1, "int4", "cpu", "unknown dtype"),
     ("qwen2.5-vl-7b", 1, "auto", "nowhere", "device 'nowhere' cannot be used")],
)  # fmt: skip
def test_wrong_requests(name: str, layers: int, dtype: str, device: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_shape(name, layers, dtype, device)


def test_limits_of_a_model() -> None:
    model = random_llama()
    assert (context_limit(model), vocabulary(model)) == (4096, 64)
    whole = sum(weight.numel() for weight in model.parameters())
    sizes = sizes_of(model)
    assert whole <= sizes.weight_bytes / 2 < whole + 1000, "and a few buffers"
    assert (sizes.full_weight_bytes, sizes.longest_context) == (2 * sizes.weight_bytes, 4096)
    for rope, longest in (
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}, 4096),
        ({"rope_type": "default"}, 4096),
    ):
        model.config.rope_parameters = {**model.config.rope_parameters, **rope}
        if "factor" not in rope:
            model.config.rope_parameters.pop("factor")
        assert context_limit(model) == longest
    mute = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    assert context_limit(SimpleNamespace(config=mute)) is None
