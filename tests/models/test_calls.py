"""The cache's name, whatever the release calls it."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from hkvprof.models.calls import NAMES, NEW, OLD, cache_keyword, cache_of, with_cache
from tests.models.tiny import build_covered

MOVED = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24)


class OfToday:
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> str:
        return "new"


class LaggingBehind:
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> str:
        return "old"


class Wrapper:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_the_signature_says_the_name() -> None:
    assert cache_keyword(OfToday().forward) == NEW
    assert cache_keyword(LaggingBehind().forward) == OLD
    assert cache_keyword(functools.partial(LaggingBehind().forward)) == OLD
    assert cache_keyword(build_covered("llama").forward) == (NEW if MOVED else OLD)


def test_a_wrapper_takes_the_name_of_the_release() -> None:
    assert cache_keyword(Wrapper(OfToday()).forward) == (NEW if MOVED else OLD)


def test_a_callable_that_cannot_be_remembered_is_asked_again() -> None:
    class Plain:
        __slots__ = ()

        def __call__(self, past_key_values: Any = None) -> None: ...

    assert cache_keyword(Plain()) == OLD


def test_nothing_is_kept_alive() -> None:
    model, partial = LaggingBehind(), None
    partial = functools.partial(model.forward)
    cache_keyword(model.forward)
    cache_keyword(partial)
    gone = weakref.ref(model)
    del model, partial
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["llama", "qwen2.5-vl"])
def test_our_own_calls_neither_warn_nor_log(name: str) -> None:
    """Both fail any test (tests/conftest.py)."""
    model = build_covered(name)
    config = model.config.get_text_config(decoder=True)
    ids = torch.arange(10, 18)[None]
    cache = DynamicCache(config=config)
    with torch.no_grad():
        output = model(input_ids=ids, **with_cache(model, cache), use_cache=True)
    assert cache_of(output) is cache
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False,
        return_dict_in_generate=True, pad_token_id=0,
        **with_cache(model, DynamicCache(config=config)),
    )  # fmt: skip
    assert cache_of(generated).get_seq_length() > 0
    assert cache_of(transformers.modeling_outputs.BaseModelOutput()) is None


@pytest.mark.skipif(not MOVED, reason="before transformers 5.24 the old name is the only one")
def test_what_is_deprecated_fails_a_test() -> None:
    model = build_covered("llama")
    ids = torch.arange(10, 18)[None]
    with torch.no_grad():
        output = model(input_ids=ids)
        with pytest.warns(FutureWarning, match="past_key_values"):
            model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
    transformers.utils.logging.warning_once.cache_clear()  # another test may have met it
    with pytest.warns(FutureWarning, match="past_key_values"):  # logged
        output.past_key_values  # noqa: B018


def test_both_names_are_known() -> None:
    assert NAMES == (NEW, OLD)
