"""Counts come from what caches hold, and a run without compression is an error."""

from __future__ import annotations

import pytest
import torch

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import CompressionError
from hkvprof.plugins.session import Counts, compressed_rows
from hkvprof.runtime.receipt import Receipt
from tests.models_for_tests import apply, left_padded, random_llama

torch.set_num_threads(1)


def receipt_of(lengths: list[int], budget: float = 0.25, beams: int = 1) -> Receipt:
    model = random_llama()
    ids, mask = left_padded(lengths)
    with apply(model, uniform_profile(model), budget=budget) as handle:
        model.generate(
            input_ids=ids, attention_mask=mask, num_beams=beams, max_new_tokens=2, do_sample=False
        )
        return handle.receipt()


def test_rows_of_a_batch_are_told_apart() -> None:
    assert compressed_rows(receipt_of([200, 90])) == [True, True]
    assert compressed_rows(receipt_of([200, 5])) == [True, False]
    assert compressed_rows(receipt_of([40, 20])) == []


def test_beams_are_one_request() -> None:
    counts = Counts()
    counts.add(receipt_of([200, 150], beams=3), 2)
    assert counts.to_json() == {"compressed": 2, "dense": 0}


def test_dense_requests_are_counted_with_the_reason() -> None:
    counts = Counts()
    counts.add(receipt_of([200, 5]), 2)
    counts.add(receipt_of([40, 20]), 2)
    assert counts.to_json() == {"compressed": 1, "dense": 3}
    assert "1 of 4 requests" in str(counts)
    assert "shorter than min_tokens=64" in str(counts)
    counts.require("loglikelihood")


def test_nothing_compressed_is_an_error_that_says_why() -> None:
    counts = Counts()
    counts.require("loglikelihood")  # nothing asked, nothing wrong
    counts.add(receipt_of([40, 20]), 2)
    with pytest.raises(CompressionError, match=r"all 2 generate_until requests.*min_tokens=64"):
        counts.require("generate_until")


def test_a_call_joins_the_total() -> None:
    total, call = Counts(), Counts()
    call.add(receipt_of([100]), 1)
    total.merge(call)
    total.merge(call)
    assert total.to_json() == {"compressed": 2, "dense": 0}
