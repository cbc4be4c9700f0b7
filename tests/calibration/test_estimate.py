"""What a dry run foretells, against what a run does."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hkvprof.calibration import index_fit
from hkvprof.calibration.calibrate import Run
from hkvprof.calibration.estimate import (
    Lengths,
    Timing,
    fitted_tokens,
    lengths,
    memory,
    middle,
    seconds,
)
from hkvprof.calibration.index_fit import Moments
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.calibration.query_fit import QuerySamples, fitted
from hkvprof.calibration.recipe import MEASURED
from hkvprof.errors import SampleError, UsageError
from hkvprof.heads import HeadGrid
from hkvprof.models.attention import hooked_attention
from hkvprof.models.outline import Outline, outline
from hkvprof.models.processing import TextProcessor
from hkvprof.report.forecast import duration
from hkvprof.samples.read import Sample
from tests.models_for_tests import random_llama
from tests.plugins.checkpoints import CHAT, save_checkpoint, words


class Peak(TorchDispatchMode):
    """The most bytes of tensors made within that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TextProcessor:
    from transformers import AutoTokenizer

    folder = save_checkpoint(tmp_path_factory.mktemp("model"), CHAT)
    return TextProcessor(AutoTokenizer.from_pretrained(folder), None)


def sample(number: int, count: int) -> Sample:
    said = ({"role": "user", "content": words(count, number)},)
    return Sample(f"s{number:02}", "t", said, words(40, 3))


@pytest.mark.parametrize(("tokens", "kv_heads"), [(60, 2), (400, 2), (400, 8)])
def test_the_peak_of_memory_is_foretold(
    processor: TextProcessor, tokens: int, kv_heads: int
) -> None:
    """Traced tensor by tensor; never less than it takes, and not twice as much."""
    model = random_llama(
        layers=2, hidden_size=128, num_attention_heads=8, num_key_value_heads=kv_heads,
        head_dim=16, intermediate_size=256,
    )  # fmt: skip
    probed, longest = ProbedModel.of(model, processor, MEASURED), sample(0, tokens)
    with hooked_attention(model), Peak() as fitting:
        moments, queries = Moments(probed.view.grid), probed.new_queries()
        Probe(probed, longest).add_moments(moments, queries)
    with hooked_attention(model):
        tables = fitted(moments, queries, (16, 32, 64))
        with Peak() as measuring:
            Probe(probed, longest).measure(tables)
    found = memory(outline(model), tokens)
    assert found.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    most = max(fitting.most, measuring.most)
    assert most <= found.peak - found.weights <= 2 * most


def test_a_long_prompt_of_a_large_model_fits_one_device() -> None:
    """32k tokens at the shape of Qwen2.5-VL-7B (its decoder), in bfloat16."""
    grid = HeadGrid(layers=28, kv_heads=4, query_heads=28, head_dim=128)
    decoder = Outline(
        grid, weight_bytes=15_231_233_024, itemsize=2, layers=28, hidden=3584,
        intermediate=18944, vocabulary=152_064,
    )  # fmt: skip
    found = memory(decoder, 32_768)
    assert found.peak <= 24 * 2**30
    assert found.reply <= found.prompt


def test_a_dtype_changes_weights_and_cache() -> None:
    model = random_llama()
    full, half = outline(model, "float32"), outline(model, "bfloat16")
    assert (full.weight_bytes, full.itemsize) == (2 * half.weight_bytes, 4)
    assert memory(full, 100).cache == 2 * memory(half, 100).cache
    with pytest.raises(UsageError, match="unknown dtype"):
        outline(model, "int3")


def test_experts_count_as_many_times_as_a_token_uses_them() -> None:
    model = random_llama()
    model.config.num_experts_per_tok, model.config.moe_intermediate_size = 8, 32
    assert outline(model).intermediate == 8 * 32
    model.config.num_experts_per_tok = 2
    assert outline(model).intermediate == 96


def test_lengths_are_those_of_prompts(processor: TextProcessor) -> None:
    samples = [sample(i, 30 + i) for i in range(3)]
    image = {"role": "user", "content": [{"type": "image", "path": "/nowhere/x.png"}]}
    bad = replace(samples[0], id="bad", messages=(image,))
    with pytest.raises(SampleError):
        lengths(processor, [*samples, bad], "raise")
    found = lengths(processor, [*samples, bad], "skip")
    assert found.tokens == {"s00": 30, "s01": 31, "s02": 32}
    assert list(found.unusable) == ["bad"]
    assert middle(found, [bad, *samples]).id == "s01"
    with pytest.raises(SampleError, match="no sample could be used"):
        lengths(processor, [bad], "skip")


def test_the_index_is_fitted_on_as_many_samples_as_foretold(
    processor: TextProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_fit, "FIT_SAMPLES", 3)
    samples = [sample(i, 30 + i) for i in range(6)]
    probed = ProbedModel.of(random_llama(layers=1), processor, MEASURED)
    seen: list[int] = []

    def count(self: Probe, moments: Moments, queries: QuerySamples) -> None:
        seen.append(self.encoded.tokens)
        moments.key_rows += self.encoded.tokens

    monkeypatch.setattr(Probe, "add_moments", count)
    for one in (Moments, QuerySamples):
        monkeypatch.setattr(one, "fit", lambda *_: None)
    Run(probed).fit(samples)
    found = Lengths({s.id: 30 + i for i, s in enumerate(samples)}, {})
    assert fitted_tokens(found, samples[::-1]) == sum(seen)
    assert len(seen) == 3


def test_seconds_add_up() -> None:
    timing = Timing(tokens=100, look=0.01, fit=5.0, measure=0.03)
    assert seconds(timing, 1000, 2000, 1000) == pytest.approx(20 + 5 + 60)
    assert seconds(timing, 0, 2000, 0) == pytest.approx(60)
    assert [duration(s) for s in (0.2, 75, 600, 12_000)] == ["1 s", "75 s", "10 min", "3 h 20 min"]
