"""At a small budget: equality with masked dense attention, in the situations that break caches."""

from __future__ import annotations

from typing import Any

from hkvprof.doctor.conversations import Patient, Script, play, probe_profile
from hkvprof.doctor.masked import Agreement, agree
from hkvprof.doctor.recording import Prelude, record
from hkvprof.doctor.records import NotApplicableError
from hkvprof.models.weights import rounds_activations
from hkvprof.models.wrappers import unwrap
from hkvprof.runtime import CompressedCache, Handle

EVERY = 4
"""Tokens after which generated ones join the budget here, so that it happens several times."""
_STEPS = 10


def _probe(
    patient: Patient, script: Script, prelude: Prelude | None = None, **options: Any
) -> Agreement:
    profile = probe_profile(patient.model)
    chosen = {"smoothing": 0.0, "compress_every": EVERY, **options}
    budget = profile.default_budget
    recorded = record(patient, profile, script, budget, prelude, **chosen)
    return agree(patient, recorded)


def text(patient: Patient) -> str:
    """A text prompt, a generation during which new tokens join the budget, a second turn."""
    tokens = patient.prompt_tokens
    joined = _probe(patient, patient.text([tokens], steps=_STEPS, turn=True))
    whole = patient.text([tokens // 2], steps=_STEPS)
    grown = _probe(patient, whole, decode_compression=False)
    return f"{joined}; generated tokens kept whole: {grown}"


def batch(patient: Patient) -> str:
    """A left-padded batch, then one whose rows are copied and change places as beams do."""
    tokens = patient.prompt_tokens
    padded = _probe(patient, patient.text([tokens, tokens * 2 // 3], turn=True))
    equal = patient.text([tokens // 2] * 3, steps=_STEPS, shuffle=(2, 0, 2))
    shuffled = _probe(patient, equal, decode_compression=False)
    return f"padded: {padded}; rows change places: {shuffled}"


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
