"""At budget 1.0 nothing may change: logits equal the unmodified model's, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.doctor.conversations import Patient, Script, first_turn, greedy, play, second_turn
from hkvprof.doctor.records import FaultError, NotApplicableError
from hkvprof.runtime import Handle, apply

LONGEST = 8192
_SECONDS = 6.0
"""What one pass over the long prompt may take, so that the doctor stays a matter of minutes."""


def stock_cache(patient: Patient) -> DynamicCache:
    """The cache that the unmodified model would make."""
    return DynamicCache(config=patient.view.text_config)


def kept_whole(patient: Patient) -> Handle:
    """Within: the model with a profile applied at a budget of 1, so that everything is kept."""
    return apply(patient.model, uniform_profile(patient.model), budget=1.0, min_tokens=1)


def expect_same(name: str, expected: Sequence[Tensor], found: Sequence[Tensor], cause: str) -> None:
    """Raise FaultError unless all passes' logits are equal to the bit."""
    if len(expected) != len(found):
        raise FaultError(f"{name}: {len(found)} passes instead of {len(expected)}", cause)
    for number, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
        if not bool(mine.isfinite().any()):
            raise FaultError(
                f"{name}: the unmodified model's own logits are not finite",
                "the checkpoint or the dtype: try another --dtype",
            )
        if torch.equal(mine, theirs):
            continue
        where = "the prompt" if number == 0 else f"decoding step {number}"
        rows = [i for i in range(len(mine)) if not torch.equal(mine[i], theirs[i])]
        difference = float((mine.float() - theirs.float()).abs().nan_to_num(torch.inf).max())
        raise FaultError(
            f"{name}: logits after {where} differ by up to {difference:.3g} (rows {rows})", cause
        )


def _alone(patient: Patient, script: Script, name: str, cause: str, own_cache: bool = True) -> str:
    """Logits of one script played alone, on the unmodified model and on the hooked one."""
    model = patient.model
    expected = play(model, script, stock_cache(patient))
    with kept_whole(patient) as handle:
        found = play(model, script, handle.new_cache() if own_cache else None)
    try:
        expect_same(name, expected, found, cause)
    except FaultError:
        again = play(model, script, stock_cache(patient))
        expect_same(f"{name}, the unmodified model twice", expected, again, _UNREPRODUCIBLE)
        raise
    return f"{_size(script)}, {len(found)} passes equal to the bit"


def _size(script: Script) -> str:
    rows = f"{script.rows} rows of up to " if script.rows > 1 else ""
    return f"{rows}{script.tokens} tokens"


def text(patient: Patient) -> str:
    """A text prompt through plain `generate`; then once more on the model given back."""
    script = patient.text([patient.prompt_tokens])
    before = play(patient.model, script, stock_cache(patient))
    said = _alone(patient, script, "text", _ANY, own_cache=False)
    after = play(patient.model, script, stock_cache(patient))
    expect_same("the model before and after", before, after, _RESTORED)
    return said


def image(patient: Patient) -> str:
    """A prompt with an image."""
    return _alone(patient, patient.images([1]), "one image", _IMAGES, own_cache=False)


def images(patient: Patient) -> str:
    """Several images of different sizes, and a question after the reply."""
    return _alone(patient, patient.images([3], turn=True), "several images", _IMAGES)


def video(patient: Patient) -> str:
    """A video of a few frames, and a question after the reply."""
    return _alone(patient, patient.video(), "video", _IMAGES)


def batch(patient: Patient) -> str:
    """Rows of different lengths, padded on the left."""
    tokens = patient.prompt_tokens
    said = [_alone(patient, patient.text([tokens, tokens // 3]), "left padding", _PADDING)]
    try:
        script = patient.images([2, 1])
    except NotApplicableError:
        return said[0]
    return "; ".join([*said, "with images " + _alone(patient, script, "images", _PADDING)])


def turns(patient: Patient) -> str:
    """A second question on the same cache."""
    return _alone(patient, patient.text([patient.prompt_tokens], turn=True), "second turn", _TURN)


def requests(patient: Patient) -> str:
    """Two conversations on one model take turns; then a request that knows of neither."""
    one = _with_images(patient, 2, turn=True)
    two = _with_images(patient, 1, turn=True)
    three = patient.text([patient.prompt_tokens // 2], seed=5)
    model = patient.model
    expected = [play(model, script, stock_cache(patient)) for script in (one, two, three)]
    with kept_whole(patient) as handle:
        caches = [handle.new_cache() for _ in range(2)]
        first = first_turn(model, one, caches[0])
        second = first_turn(model, two, caches[1])
        first += second_turn(model, one, caches[0])
        second += second_turn(model, two, caches[1])
        found = [first, second, play(model, three)]
    for name, mine, theirs in zip(("first", "second", "later"), expected, found, strict=True):
        expect_same(f"{name} of three requests", mine, theirs, _REQUESTS)
    return "two interleaved conversations and a later request, all passes equal to the bit"


def _with_images(patient: Patient, count: int, turn: bool) -> Script:
    try:
        return patient.images([count], turn)
    except NotApplicableError:
        return patient.text([patient.prompt_tokens // count], seed=count, turn=turn)


def long(patient: Patient) -> str:
    """A long prompt at once and in chunks."""
    tokens = _affordable(patient)
    said = []
    for name, options in (("at once", {}), ("in chunks", {"prefill_chunk_size": tokens // 3})):
        script = patient.text([tokens], steps=3, options=options)
        said.append(f"{name}: {_alone(patient, script, name, _LONG)}")
    return "; ".join(said)


def _affordable(patient: Patient) -> int:
    """Tokens of a long prompt: bounded by the model's positions, and by time.

    A prompt's time grows with the square of its length at most.
    """
    script = patient.text([patient.prompt_tokens], steps=1)
    began = time.perf_counter()
    play(patient.model, script, stock_cache(patient))
    longer = (_SECONDS / (time.perf_counter() - began)) ** 0.5
    wanted = max(2, longer) * patient.prompt_tokens
    return min(int(wanted), LONGEST, patient.limit - 16)


def beams(patient: Patient) -> str:
    """Beam search over padded rows: rows of the cache are repeated and change places."""
    tokens = patient.prompt_tokens // 2
    inputs = patient.text([tokens, tokens - 9]).inputs
    return _searched(patient, inputs, "beam search", _BEAMS, beams=2)


def lookup(patient: Patient) -> str:
    """Prompt lookup: guessed tokens go in together and are cropped where they were wrong."""
    ids = patient.ids(1, patient.prompt_tokens // 8, seed=2).repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _searched(patient, inputs, "prompt lookup", _LOOKUP, prompt_lookup_num_tokens=3)


def _searched(
    patient: Patient, inputs: dict[str, Tensor], name: str, cause: str, **options: Any
) -> str:
    def run() -> Any:
        with torch.no_grad():
            config = greedy(patient.model, 8, **options)
            return patient.model.generate(**inputs, generation_config=config)

    try:
        expected = run()
    except Exception as error:  # whatever the model itself cannot do, hkvprof need not do
        raise NotApplicableError(
            f"the unmodified model fails: {str(error).splitlines()[0]}"
        ) from error
    with kept_whole(patient):
        found = run()
    if not torch.equal(expected.sequences, found.sequences):
        raise FaultError(f"{name}: other tokens than the unmodified model's", cause)
    expect_same(name, expected.logits, found.logits, cause)
    return f"{len(found.logits)} passes equal to the bit"


_UNREPRODUCIBLE = (
    "this machine does not compute the same twice (a nondeterministic kernel): set "
    "torch.use_deterministic_algorithms(True)"
)
_RESTORED = "detach() does not give the model back as it was, or this machine's results vary"
_ANY = "the attention seam: the layer does not hand its dense keys, values or mask on as they are"
_IMAGES = "positions of images (M-RoPE): the offset kept between passes is lost or another's"
_PADDING = (
    "the mask: hkvprof's attention name has no mask function (AttentionMaskInterface), so that "
    "padding is attended to"
)
_TURN = "positions: the cache reports another length than the tokens it has seen"
_REQUESTS = (
    "state of one conversation reaches another: the M-RoPE offset (rope_deltas) is not exchanged, "
    "or a cache keeps something of a former request"
)
_LONG = "a prompt in chunks: the layer loses or repeats a chunk, or positions restart"
_BEAMS = "rows of the cache do not follow the beams (reorder_cache, batch_repeat_interleave)"
_LOOKUP = "crop(): guessed tokens stay in the cache, or its length is wrong after it"
