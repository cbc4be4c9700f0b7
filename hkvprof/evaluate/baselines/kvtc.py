"""KVTC: a transform coder for whole caches, calibrated once per model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.errors import BudgetError, ModelError, UsageError
from hkvprof.evaluate.baselines.base import Kept, PromptView, Selection, baseline
from hkvprof.evaluate.baselines.codes import encode_groups
from hkvprof.evaluate.baselines.scores import SINKS
from hkvprof.evaluate.prefill import Prefill
from hkvprof.models.decoder_input import Rotation

WINDOW = 128
"""Recent tokens in 16 bits, as published, where they take no more than half of the room."""
RANK, STEP = 768, 16
"""Components that are fitted at most, and how many neighbours of them a group has at least."""
GROUPS, BITS = (1, 4, 16), (0, 2, 4, 8)
"""Sizes of groups in steps, and what their coefficients may be coded in."""
OVERHEAD = 32
"""Bits of a group's scale and least value, per token."""
_JUDGED_ROWS = 512
_TRIES = 5
Group = tuple[int, int, int]
"""First component, one past the last, and bits."""


@baseline("kvtc", "KVTC-like", "arXiv 2511.01815")
def kvtc(prompt: PromptView) -> Selection:
    """Principal components over all layers and heads, bits by dynamic programming, DEFLATE.

    Keys are coded without their rotation. The first 4 and the recent tokens stay in 16 bits. The
    components are of calibration prompts and, being the model's, do not count; what counts is the
    deflated length. Raises UsageError without calibration prompts, BudgetError.
    """
    bases = prompt.offline("kvtc", lambda: [fit(rows) for rows in calibrated(prompt)])
    recent = min(WINDOW, prompt.room // 2, prompt.tokens - SINKS - 1)
    old = slice(SINKS, prompt.tokens - recent)
    heads = prompt.grid.total
    exact = (SINKS + recent) * prompt.token_bytes * heads
    room = prompt.share * prompt.tokens * prompt.token_bytes * heads - exact
    if room <= 0:
        raise BudgetError(
            f"the first {SINKS} and the last {recent} tokens in 16 bits exceed the budget of "
            f"{prompt.share:.4g}: raise it, or use longer prompts"
        )
    made = [
        basis.coded(rows[old], room / 2)
        for basis, rows in zip(bases, flat(prompt.prefill), strict=True)
    ]
    stored = exact + sum(size for _, size in made)
    return _restored(prompt, old, [rows for rows, _ in made], -(-stored // heads))


@dataclass(frozen=True)
class PrincipalBasis:
    """Mean and leading components of keys or values, and coefficients to judge groups by."""

    mean: Float[Tensor, " features"]
    components: Float[Tensor, "features rank"]
    judged: Float[Tensor, "rows rank"]

    def coded(
        self, rows: Float[Tensor, "tokens features"], room: float
    ) -> tuple[Float[Tensor, "tokens features"], int]:
        """The rows through the best codes that, deflated, take at most `room` bytes; their bytes.

        Raises BudgetError where not even empty ones fit.
        """
        coefficients = (rows - self.mean) @ self.components
        bits, found = 8 * room / len(rows), None
        for _ in range(_TRIES):
            groups = allocate(self.judged, int(bits))
            made, size = _code(coefficients, groups)
            if size <= room and (found is None or size > found[1]):
                found = made, size
            if found is not None and found[1] > 0.97 * room:
                break
            bits *= room / max(size, 1) * (1.0 if size <= room else 0.98)
        if found is None:
            raise BudgetError(
                f"no code of {len(rows)} tokens fits into {room:.0f} bytes: raise the budget"
            )
        return found[0] @ self.components.T + self.mean, found[1]


def fit(rows: Float[Tensor, "tokens features"]) -> PrincipalBasis:
    """Leading principal components, by randomised SVD (as published)."""
    mean = rows.mean(dim=0)
    rank = min(RANK, *rows.shape) // STEP * STEP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = torch.svd_lowrank(rows - mean, q=rank, niter=2)[2]
    some = rows[:: max(1, len(rows) // _JUDGED_ROWS)]
    return PrincipalBasis(mean, components, (some - mean) @ components)


def calibrated(prompt: PromptView) -> list[Float[Tensor, "tokens features"]]:
    """Keys without rotation, and values, of the calibration prompts' tokens but for the first."""
    if prompt.calibration is None:
        raise UsageError(
            "kvtc fits its components on calibration prompts, and there are none here: run it with "
            "`hkvprof eval`"
        )
    parts: Any = zip(*(flat(prefill) for prefill in prompt.calibration()), strict=True)
    return [torch.cat([rows[SINKS:] for rows in kind]) for kind in parts]


def flat(prefill: Prefill) -> list[Float[Tensor, "tokens features"]]:
    """Keys without their rotation, and values: all layers and heads of a token side by side."""
    rotation = _rotation(prefill)
    keys = [rotation.undo(call.key[0]) for call in prefill.calls]
    values = [call.value[0].float() for call in prefill.calls]
    return [torch.cat(x).transpose(0, 1).flatten(1) for x in (keys, values)]


def allocate(judged: Float[Tensor, "rows rank"], bits: int) -> list[Group]:
    """Groups of components and their bits that lose least, of at most `bits` per token.

    Dynamic programming over the components in steps of 16 and the bits in steps of 32.
    """
    steps, budget = judged.shape[1] // STEP, max(0, bits) // OVERHEAD
    lost = np.full((steps + 1, budget + 1), np.inf)
    lost[0] = 0.0
    choice: dict[int, NDArray[np.int64]] = {0: np.zeros((budget + 1, 3), dtype=np.int64)}
    for end in range(1, steps + 1):
        choice[end] = np.zeros((budget + 1, 3), dtype=np.int64)
        for size in (one for one in GROUPS if one <= end):
            for width in BITS:
                cost = (size * STEP * width + OVERHEAD * bool(width)) // OVERHEAD
                if cost > budget:
                    continue
                new = lost[end - size, : budget + 1 - cost] + _error(judged, end, size, width)
                better = new < lost[end, cost:]
                lost[end, cost:][better] = new[better]
                choice[end][cost:][better] = size, width, cost
    groups: list[Group] = []
    end, left = steps, budget
    while end:
        size, width, cost = (int(x) for x in choice[end][left])
        groups.append(((end - size) * STEP, end * STEP, width))
        end, left = end - size, left - cost
    return [group for group in reversed(groups) if group[2]]


def _error(judged: Tensor, end: int, size: int, width: int) -> float:
    """Squared error of coding a group of steps that ends there."""
    part = judged[:, (end - size) * STEP : end * STEP]
    if not width:
        return float(part.square().sum())
    return float((encode_groups(part, width, part.shape[1]).decode() - part).square().sum())


def _code(
    coefficients: Float[Tensor, "tokens rank"], groups: list[Group]
) -> tuple[Float[Tensor, "tokens rank"], int]:
    """The coefficients through their codes, and the bytes of these when deflated."""
    made, parts = torch.zeros_like(coefficients), []
    for first, end, width in groups:
        codes = encode_groups(coefficients[:, first:end], width, end - first)
        made[:, first:end] = codes.decode()
        for tensor in (codes.codes, codes.scale.view(torch.uint8), codes.least.view(torch.uint8)):
            parts.append(tensor.cpu().numpy().tobytes())
    return made, len(zlib.compress(b"".join(parts), 6))


def _restored(prompt: PromptView, old: slice, rows: list[Tensor], stored: int) -> Selection:
    """Every head's tokens: those in the middle from their codes, keys rotated again."""
    grid, rotation = prompt.grid, _rotation(prompt.prefill)
    shape = (-1, grid.layers, grid.kv_heads, grid.head_dim)
    keys, values = (part.view(shape).permute(1, 2, 0, 3) for part in rows)
    cos, sin = rotation.cos[old], rotation.sin[old]
    square = cos**2 + sin**2
    again = Rotation(cos / square, -sin / square)  # undoing the inverse
    selection: Selection = []
    for number, layer in enumerate(prompt.layers):
        key, value = layer.key.clone(), layer.value.clone()
        key[:, old] = again.undo(keys[number]).to(key.dtype)
        value[:, old] = values[number].to(value.dtype)
        selection.append([Kept(*pair, stored) for pair in zip(key, value, strict=True)])
    return selection


def _rotation(prefill: Prefill) -> Rotation:
    if prefill.decoder_input.rotation is None:
        raise ModelError(
            "kvtc codes keys without their rotary embedding, and this model has none: leave it out"
        )
    return prefill.decoder_input.rotation
