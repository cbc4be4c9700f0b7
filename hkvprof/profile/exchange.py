"""What other projects' files of head scores hold, as records, and profiles from and to them.

The files themselves are read and written in `formats`. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import ProfileError, UsageError
from hkvprof.files.atomic import read_limited
from hkvprof.heads import EXACT_BITS, HeadGrid, HeadType, KeepRule, ModelFingerprint, Strategy
from hkvprof.profile.given import given_profile
from hkvprof.profile.record import Profile

MAX_BYTES = 128 * 2**20
"""Of one file of another project; SparseMM's with a thousand samples has some tens of MiB."""
AT = 0.2
"""The share at which heads are ranked by what they lose: small enough that they differ."""
HALF = 0.5
"""The share of heads that keep everything, where nothing else is said; DuoAttention's examples."""
POOL = 7
"""Pooling of imported static heads, as SnapKV and SparseMM use."""
LONG = 32_768
"""Prompt tokens for which a sliding window is turned into a share."""

_NOT_HELD = (
    "the model that the file is for: no reader can tell that it meets another one of this shape",
    "how heads are scored, the bits of kept tokens, and the index of dynamic heads: a reader has "
    "its own ways",
)


@dataclass(frozen=True)
class Parcel:
    """The files of one format by name, and what they do not hold, or hold otherwise."""

    files: Mapping[str, bytes]
    not_held: tuple[str, ...]


@dataclass(frozen=True)
class HeadScores:
    """What foreign files say of the KV heads of a model.

    `share` float32 [layers, kv_heads] in (0, 1] at `budget`, their mean; `keep` is what every head
    keeps; `not_held` says what of the files a profile does not hold, or holds otherwise.
    """

    share: NDArray[np.float32]
    budget: float
    keep: KeepRule
    not_held: tuple[str, ...]


@dataclass(frozen=True)
class Format:
    """A format: who reads it, its files, and the two ways.

    `read` takes the bytes by file name, the model's grid, and a budget (None: the format's own).
    """

    name: str
    reader: str
    files: tuple[str, ...]
    write: Callable[[Profile], Parcel]
    read: Callable[[Mapping[str, bytes], HeadGrid, float | None], HeadScores]


def parcel(files: Mapping[str, bytes], *not_held: str) -> Parcel:
    """Files with what no format holds, and what this one does not."""
    return Parcel(files, (*_NOT_HELD, *not_held))


def head_ranks(profile: Profile) -> NDArray[np.float64]:
    """How badly every KV head [layers, kv_heads] needs its tokens, from 0 to 1, evenly spread.

    Heads are ranked by what they lose under their best static strategy of 16 bits at AT of their
    bytes, at the profile's usual prompt length; where no losses were measured (`paper`), by their
    lack of sparsity. Heads that tie share a rank. Raises UsageError where a profile tells no head
    from another.
    """
    need = _lack_of_sparsity(profile) if profile.recipe != "measured" else _loss_at(profile)
    if float(need.max()) <= float(need.min()):
        raise UsageError(
            f"this profile (recipe {profile.recipe}) tells no head from another, so there are no "
            "scores to export: expected one made by `hkvprof calibrate`"
        )
    values = np.sort(need, axis=None)
    first, last = (np.searchsorted(values, need, side=side) for side in ("left", "right"))
    return np.asarray((first + last - 1) / 2 / (need.size - 1))


def _loss_at(profile: Profile) -> NDArray[np.float64]:
    static = [
        one.head_type is HeadType.STATIC and one.resident_bits == EXACT_BITS
        for one in profile.strategies
    ]
    if not any(static):
        raise UsageError(
            "this profile was calibrated without static heads of 16 bits: other projects prune, "
            "and it does not say what that costs; calibrate with both kinds"
        )
    near = int(np.argmin(np.abs(profile.ratios - AT)))
    loss = profile.loss_at(profile.usual_tokens)[static].min(axis=0)
    return np.asarray(loss[..., near], dtype=np.float64)


def _lack_of_sparsity(profile: Profile) -> NDArray[np.float64]:
    grid = profile.grid
    mean = profile.sparsity_mean[0].reshape(grid.layers, grid.kv_heads, grid.group)
    return np.asarray(1 - mean.astype(np.float64).mean(axis=-1))


def read_files(chosen: Format, path: Path) -> dict[str, bytes]:
    """The bytes of a format's files: `path` is the file, or a folder that holds them.

    Raises ProfileError.
    """
    paths = {name: path / name for name in chosen.files}
    if path.is_file() and len(chosen.files) == 1:
        paths = {chosen.files[0]: path}
    found = {}
    for name, file in paths.items():
        try:
            found[name] = read_limited(file, MAX_BYTES)
        except OSError as error:
            raise ProfileError(
                f"cannot read {file} ({error.strerror}): {chosen.reader} reads "
                f"{' and '.join(chosen.files)}; give that file, or the folder"
            ) from None
        except ValueError as error:
            raise ProfileError(f"{file}: {error}") from None
    return found


def imported(
    chosen: Format, path: Path, fingerprint: ModelFingerprint, budget: float | None
) -> tuple[Profile, tuple[str, ...]]:
    """A profile of the model from another project's files, and what it does not hold of them.

    All heads are static: no foreign file knows an index. Raises ProfileError for files that are not
    of the model's shape or cannot be what they should, UsageError.
    """
    files = read_files(chosen, path)
    reading = chosen.read(files, fingerprint.grid, budget)
    digest = hashlib.sha256(b"".join(files[name] for name in chosen.files)).hexdigest()
    origin = {"format": chosen.name, "file": path.name, "sha256": digest}
    menu = (Strategy(HeadType.STATIC, pool=POOL),)
    choice = np.zeros(reading.share.shape, dtype=np.uint8)
    profile = given_profile(
        fingerprint, menu, choice, reading.share, reading.budget, reading.keep,
        {"imported": {**origin, "not_held": list(reading.not_held)}},
    )  # fmt: skip
    return profile, reading.not_held


def window_share(sinks: int, recent: int) -> float:
    """What sinks and a window are of a prompt of LONG tokens."""
    return min(1.0, KeepRule(sinks=sinks, recent=recent).floor_tokens / LONG)


def full_or_window(full: NDArray[np.bool_], sinks: int, recent: int, *not_held: str) -> HeadScores:
    """The reading of a pattern: some KV heads keep everything, the rest sinks and a window."""
    keep, least = KeepRule(sinks=sinks, recent=recent), window_share(sinks, recent)
    share = np.where(full, 1.0, least).astype(np.float32)
    said = (
        f"windows of {sinks} first and {recent} last tokens: the other heads keep these, and "
        f"beyond them what their share grants, {least:.2%} of a prompt of {LONG:,} tokens",
        *not_held,
    )
    return HeadScores(share, float(share.astype(np.float64).mean()), keep, said)
