"""Claims of compression that a second figure contradicts."""

import weakref
from types import SimpleNamespace

import pytest

from hkvprof.bench.contestant import BenchModel, PromptContestant, Sizes, verify
from hkvprof.bench.machine import no_collector
from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.prompts import random_prompt
from hkvprof.errors import CompressionError
from tests.models_for_tests import random_llama

METHOD = Method(Kind.PROFILE, "0.10")


def receipt(layers: int = 2, reason: str = "") -> SimpleNamespace:
    return SimpleNamespace(compressed_layers=layers, layers=[SimpleNamespace(reason=reason)] * 2)


def test_a_sound_row_passes() -> None:
    verify(METHOD, 512, Sizes(resident=104, storage=104, host=0, dense=1000), receipt())
    verify(Method(Kind.PROFILE, "152"), 512, Sizes(100, 100, 0, 1000), receipt())
    verify(Method(Kind.PROFILE, "100 B"), 512, Sizes(100, 100, 900, 1000), receipt())


@pytest.mark.parametrize(
    ("sizes", "account", "words"),
    [(Sizes(1000, 1000, 0, 1000), receipt(0, "short"), "nothing was compressed .short."),
     (Sizes(1000, 1000, 0, 1000), receipt(2), "nothing was compressed"),
     (Sizes(90, 91, 0, 1000), receipt(), "tells 90 resident bytes, the cache's tensors hold 91"),
     (Sizes(106, 106, 0, 1000), receipt(), "at most 10.00% of the dense bytes, found 10.60%")],
)  # fmt: skip
def test_an_unsound_row_fails(sizes: Sizes, account: SimpleNamespace, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        verify(METHOD, 512, sizes, account)


def test_a_cache_is_gone_with_its_contestant() -> None:
    """Without the garbage collector, which rests while a benchmark runs."""
    model = random_llama(layers=1)
    contestant = PromptContestant(
        BenchModel.of(model), Method(Kind.DENSE), random_prompt(model, 32, 1, 4)
    )
    contestant.prefill()
    contestant.decode(4)
    cache = weakref.ref(contestant.cache)
    with no_collector():
        del contestant
        assert cache() is None
