"""Checks at a small budget: equality with masked dense attention, in the situations that break
caches; and whether the bytes are really free, counted over all tensors that live in this process.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from hkvprof.bench.machine import no_collector, stock_bytes
from hkvprof.doctor.conversations import Patient, Script, play, probe_profile
from hkvprof.doctor.exact import stock_cache
from hkvprof.doctor.masked import Agreement, agree
from hkvprof.doctor.recording import Prelude, record
from hkvprof.doctor.records import FaultError, NotApplicableError
from hkvprof.heads import EXACT_BITS
from hkvprof.models.weights import rounds_activations
from hkvprof.models.wrappers import unwrap
from hkvprof.profile.record import Profile
from hkvprof.runtime import CompressedCache, Handle, apply, measure_storage

EVERY = 4
"""Tokens after which generated ones join the budget here, so that it happens several times."""
_STEPS = 10


def _probe(
    patient: Patient,
    script: Script,
    prelude: Prelude | None = None,
    bits: int = EXACT_BITS,
    **options: Any,
) -> Agreement:
    profile = probe_profile(patient.model, bits)
    chosen = {"smoothing": 0.0, "compress_every": EVERY, **options}
    budget = profile.default_budget
    recorded = record(patient, profile, script, budget, prelude, **chosen)
    return agree(patient, recorded)


def text(patient: Patient) -> str:
    """A text prompt, a generation during which new tokens join the budget, a second turn."""
    tokens = patient.prompt_tokens
    joined = _probe(patient, patient.text([tokens], steps=_STEPS, turn=True))
    whole = patient.text([tokens // 2], steps=_STEPS)
    grown = _probe(patient, whole, compress_every=0)
    return f"{joined}; generated tokens kept whole: {grown}"


def batch(patient: Patient) -> str:
    """A left-padded batch, then one whose rows are copied and change places as beams do."""
    tokens = patient.prompt_tokens
    padded = _probe(patient, patient.text([tokens, tokens * 2 // 3], turn=True))
    equal = patient.text([tokens // 2] * 3, steps=_STEPS, shuffle=(2, 0, 2))
    shuffled = _probe(patient, equal, compress_every=0)
    return f"padded: {padded}; rows change places: {shuffled}"


def bits(patient: Patient) -> str:
    """Static heads in 8 and in 4 bits, dynamic ones in 8: padded rows, tokens that join, a turn."""
    tokens, said = patient.prompt_tokens, []
    for count in (8, 4):
        lengths = [tokens, tokens * 2 // 3]
        script = patient.text(lengths, steps=_STEPS, turn=True, seed=count)
        said.append(f"{count} bits: {_probe(patient, script, bits=count)}")
    return "; ".join(said)


def images(patient: Patient) -> str:
    """Rows with different numbers of images, and a question after the reply."""
    return str(_probe(patient, patient.images([3, 2], turn=True)))


def requests(patient: Patient) -> str:
    """A request after others: on a cache that was reset, and on a fresh one."""
    tokens = patient.prompt_tokens
    script = patient.text([tokens // 2], steps=_STEPS, seed=6)
    try:
        former = patient.images([2, 1], steps=5)
    except NotApplicableError:
        former = patient.text([tokens * 3 // 4, tokens], steps=5)

    def reset(handle: Handle, cache: CompressedCache) -> CompressedCache:
        play(patient.model, former, cache)
        cache.reset()
        return cache

    def fresh(handle: Handle, cache: CompressedCache) -> CompressedCache:
        play(patient.model, former, cache)
        return handle.new_cache()

    return f"cache reset: {_probe(patient, script, reset)}; new cache: " + str(
        _probe(patient, script, fresh)
    )


def chunks(patient: Patient) -> str:
    """A prompt in chunks, which wait outside the device until it is complete."""
    tokens = patient.prompt_tokens
    script = patient.text([tokens], options={"prefill_chunk_size": tokens * 2 // 5})
    return str(_probe(patient, script))


def logits(patient: Patient) -> str:
    """Whole passes, with the given profile at its own budget and the default options."""
    given = patient.profile or probe_profile(patient.model)
    script = patient.text([patient.prompt_tokens * 3 // 2], turn=True)
    budget = given.default_budget
    recorded = record(patient, given, script, budget, compress_every=EVERY)
    jumps = rounds_activations(unwrap(patient.model))
    said = agree(patient, recorded, compare_logits=not jumps)
    name = "doctor's" if patient.profile is None else "given"
    alone = "; logits jump, as the model rounds its activations: not compared" if jumps else ""
    return f"the {name} profile at {budget:.0%}: {said}{alone}"


_SLACK_BYTES, _SLACK_SHARE = 8192, 1 / 1000
"""What a request may leave beside its cache, such as position offsets: and of the dense bytes."""
_ALLOCATOR, _BLOCKS = 512, 64
"""CUDA's allocator hands out blocks of this size; so many per layer may be partly empty."""
_LEAK = "keys and values stay alive after compression: a layer, a hook or a closure refers to them"
_COUNT = "the receipt counts other tensors than the cache holds"
_OVER = "more is kept than the budget allows: slack, indexes or a head that was not compressed"


def memory(patient: Patient) -> str:
    """Live tensors against the receipt and against a dense cache; gone with the cache."""
    profile = probe_profile(patient.model)
    script = patient.text([patient.prompt_tokens] * 2, steps=1)
    with no_collector():  # looks at what is made from here on, which is all that matters
        stock = stock_cache(patient)
        whole, _ = _held(script, patient, stock)
        dense = stock_bytes(stock, patient.view)
        return _compare(patient, profile, script, dense, whole - dense)


def _compare(patient: Patient, profile: Profile, script: Script, dense: int, others: int) -> str:
    """`dense` bytes are those of covered layers in a stock cache, `others` those of all else in it
    (sliding windows)."""
    budget, slack = profile.default_budget, int(_SLACK_BYTES + dense * _SLACK_SHARE)
    before, _ = _live()
    with apply(patient.model, profile, budget=budget, min_tokens=1) as handle:
        cache = handle.new_cache()
        held, allocated = _held(script, patient, cache)
        receipt, counted = cache.receipt(), measure_storage(cache)
        del cache
    left = _live()[0] - before
    claimed = (receipt.resident_bytes, receipt.host_bytes)
    share = receipt.resident_bytes / dense
    _expect(abs(receipt.dense_bytes - dense) <= slack, "dense bytes by receipt",
            receipt.dense_bytes, dense, _COUNT)  # fmt: skip
    _expect(counted == claimed, "resident and host bytes by receipt", claimed, counted, _COUNT)
    expected = sum(claimed) + receipt.query_bytes + others
    _expect(abs(held - expected) <= slack, "bytes of live tensors", held, expected, _LEAK)
    _expect(share <= budget, "resident share of dense bytes", share, budget, _OVER)
    _expect(left <= slack, "bytes of live tensors once the cache is gone", left, 0, _LEAK)
    said = (
        f"{held:,} bytes live (receipt: {claimed[0]:,} resident, {claimed[1]:,} on the host), "
        f"dense {dense:,}: {share:.1%} resident"
    )
    if allocated is None:
        return said
    most = claimed[0] + others + slack + _BLOCKS * _ALLOCATOR * len(patient.view.attention)
    _expect(allocated <= most, "bytes allocated on the device", allocated, claimed[0], _LEAK)
    return f"{said}; the device's allocator: {allocated:,}"


def _expect(fine: bool, what: str, found: Any, expected: Any, cause: str) -> None:
    if not fine:
        raise FaultError(f"{what}: {_number(found)}, expected {_number(expected)}", cause)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def _held(script: Script, patient: Patient, cache: Any) -> tuple[int, int | None]:
    """Bytes that a prompt leaves behind, the caches' alone: of live tensors, and by CUDA."""
    before = _live()
    play(patient.model, script, cache)
    after = _live()
    allocated = None
    if before[1] is not None and after[1] is not None:
        allocated = after[1] - before[1]
    return after[0] - before[0], allocated


def _live() -> tuple[int, int | None]:
    """Bytes of the storages of all tensors that Python knows, and those CUDA has allocated."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
    return sum(storages.values()), allocated
