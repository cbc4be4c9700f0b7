"""A prompt in chunks turns a layer's state into the next one; bytes follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError
from hkvprof.models.calls import with_cache
from hkvprof.runtime import measure_storage
from hkvprof.runtime.accounts import LayerState
from hkvprof.runtime.layer_states import DenseTokens, WaitingPrompt
from hkvprof.runtime.ragged import RaggedLayer
from tests.models_for_tests import apply, random_llama, token_ids


@pytest.mark.parametrize(("budget", "last"), [(0.3, RaggedLayer), (4096, DenseTokens)])
@torch.no_grad()
def test_dense_waiting_and_then_as_planned(budget: float, last: type) -> None:
    llama, ids = random_llama(), token_ids(1, 120)
    with apply(llama, uniform_profile(llama), budget=budget) as handle:
        cache = handle.new_cache(prompt_tokens=120)
        assert types_of(cache) == {DenseTokens}
        llama(input_ids=ids[:, :70], **with_cache(llama, cache))
        assert types_of(cache) == {WaitingPrompt}
        assert bytes_of(cache) == measure_storage(cache)
        assert bytes_of(cache)[0] == 0 < bytes_of(cache)[1]
        with pytest.raises(CompressionError, match=r"waits on the host.*no dense keys"):
            cache.covered[0].keys  # noqa: B018
        with pytest.raises(CompressionError, match="cropped between its prefill chunks"):
            cache.crop(-1)
        llama(input_ids=ids[:, 70:], **with_cache(llama, cache))
        assert types_of(cache) == {last}
        assert bytes_of(cache) == measure_storage(cache)
        compressed = last is RaggedLayer
        state = LayerState.COMPRESSED if compressed else LayerState.DENSE
        assert {layer.account.state for layer in cache.covered} == {state}
        assert cache.receipt().to_json()["layers"][0]["state"] == state.value
        if not compressed:
            assert bytes_of(cache)[1] == 0, "a prompt that stays dense waits no more"
        cache.reset()
        assert types_of(cache) == {DenseTokens}
        assert cache.covered[0].keys is None


def types_of(cache: Any) -> set[type]:
    return {type(layer.state) for layer in cache.covered}


def bytes_of(cache: Any) -> tuple[int, int]:
    receipt = cache.receipt()
    return receipt.resident_bytes, receipt.host_bytes
