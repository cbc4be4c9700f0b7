"""The doctor finds every seeded fault, and nothing in a healthy installation."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hkvprof import load_model
from hkvprof.doctor.examine import CHECKS, examine
from hkvprof.doctor.records import Status
from tests.doctor import faults
from tests.doctor.faults import Fault, seeded
from tests.models.tiny import build_covered
from tests.models_for_tests import random_llama

torch.set_num_threads(1)

TABLE: list[tuple[Fault, str, str]] = [
    (faults.no_mask_registration, "batch", "no mask function"),
    (faults.no_mask_registration, "masked-batch", "not handed to the model's implementation"),
    (faults.stored_length_as_logical, "masked-text", "get_seq_length"),
    (faults.stored_length_in_masks, "masked-text", "get_mask_sizes"),
    (faults.heads_grouped_by_remainder, "masked-chunks", "head grouping"),
    (faults.scores_of_another_group, "masked-chunks", "query group"),
    (faults.layers_reversed, "masked-chunks", "layers, rows or masks are not what"),
    (faults.plans_of_the_next_layer, "masked-chunks", "the plan of one was applied to another"),
    (faults.kept_tokens_off_by_one, "masked-chunks", "off by one"),
    (faults.kept_tokens_by_rank, "masked-chunks", "numbers of the kept tokens"),
    (faults.values_of_the_next_token, "masked-chunks", "beside another token's value"),
    (faults.starts_ignored, "masked-batch", "padding was kept"),
    (faults.reset_forgets_nothing_but_keys, "masked-requests", "gave up"),
    (faults.conversations_share_their_starts, "masked-requests", "layers, rows or masks"),
    (faults.retrieval_bound_to_old_storage, "masked-text", "stale binding"),
    (faults.slots_not_updated, "masked-chunks", "slot map"),
    (faults.means_of_the_next_segment, "masked-bits", "do not give back what was stored"),
    (faults.rows_quantised_without_rotation, "masked-bits", "do not give back what was stored"),
    (faults.beams_share_a_slot_map, "masked-batch", "slot map"),
    (faults.rows_stay_where_they_are, "masked-batch", "layers, heads or rows"),
    (faults.rows_stay_where_they_are, "beams", "do not follow the beams"),
    (faults.keys_and_values_swapped_on_the_host, "masked-chunks", "changed places"),
    (faults.keys_and_values_swapped_when_fetched, "masked-chunks", "changed places"),
    (faults.worst_chunks_fetched, "masked-chunks", "other chunks than the query asks for"),
    (faults.wrong_scaling, "masked-chunks", "scaling"),
    (faults.wrong_scaling, "masked-logits", "scaling"),
    (faults.later_tokens_are_seen, "masked-logits", "mask of this pass"),
    (faults.tail_pruned_by_other_queries, "masked-text", "numbers of the kept tokens"),
    (faults.dense_keys_kept_by_the_layer, "memory", "counts other tensors"),
    (faults.dense_keys_kept_elsewhere, "memory", "stay alive after compression"),
    (faults.guesses_not_cropped, "lookup", "crop()"),
    (faults.a_chunk_in_the_wrong_place, "masked-chunks", "not handed to the model"),
    (faults.detach_leaves_the_attention, "text", "detach() does not give the model back"),
]
"""Fault, a check that must fail, and words of the cause it names."""

WITH_IMAGES: list[tuple[Fault, str, str]] = [
    (faults.rope_deltas_not_exchanged, "requests", "rope_deltas"),
    (faults.rope_deltas_lost, "images", "M-RoPE"),
    (faults.rope_deltas_lost, "masked-images", "M-RoPE"),
    (faults.no_mask_registration, "images", "M-RoPE"),
]


@cache
def llama() -> Any:
    return random_llama(max_position_embeddings=640)


@cache
def tinyvl() -> tuple[Any, Any]:
    return load_model("tinyvl", dtype="float32", device="cpu")


def cause_found(model: Any, processor: Any, fault: Fault, check: str) -> str:
    with seeded(fault):
        (outcome,) = examine(model, processor, only=[check]).outcomes
    assert outcome.name == check
    assert outcome.status is Status.FAILED, f"{check} passes in spite of {fault.__name__}"
    assert outcome.detail
    return outcome.cause


@pytest.mark.parametrize(
    ("fault", "check", "cause"), TABLE, ids=lambda x: getattr(x, "__name__", x)
)
def test_faults_are_found_and_named(fault: Fault, check: str, cause: str) -> None:
    model = random_llama() if fault is faults.detach_leaves_the_attention else llama()
    assert cause in cause_found(model, None, fault, check)


@pytest.mark.parametrize(
    ("fault", "check", "cause"), WITH_IMAGES, ids=lambda x: getattr(x, "__name__", x)
)
def test_faults_with_images_are_found_and_named(fault: Fault, check: str, cause: str) -> None:
    assert cause in cause_found(*tinyvl(), fault, check)


def test_every_fault_is_in_a_table() -> None:
    listed = {fault.__name__ for fault, *_ in [*TABLE, *WITH_IMAGES]}
    defined = {
        name for name, thing in vars(faults).items()
        if callable(thing) and getattr(thing, "__module__", "") == faults.__name__
    }  # fmt: skip
    assert defined - {"seeded"} == listed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_healthy_model_passes(dtype: torch.dtype) -> None:
    report = examine(random_llama(layers=2, max_position_embeddings=640).to(dtype))
    assert not report.failures
    found = {o.name: o.status for o in report.outcomes}
    assert [*found] == [check.name for check in CHECKS]
    images = {"image", "images", "video", "masked-images"}
    assert {name for name, s in found.items() if s is Status.NOT_APPLICABLE} == images


def test_layers_that_are_not_covered_are_left_alone() -> None:
    model = build_covered("gemma3")
    report = examine(model, only=["text", "masked-batch", "masked-requests", "memory"])
    assert not report.failures
    assert "2 layers, 9 passes" in report.outcomes[1].detail, "of 4, two have sliding windows"


def test_a_healthy_model_passes_with_images() -> None:
    checks = ["images", "video", "batch", "requests", "masked-images"]
    report = examine(*tinyvl(), only=checks)
    assert not report.failures
    refused = [o for o in report.outcomes if o.status is Status.NOT_APPLICABLE]
    assert [o.name for o in refused] == ["video"]
    assert "video" in refused[0].detail
