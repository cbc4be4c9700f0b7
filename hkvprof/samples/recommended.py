"""Public sets to calibrate on, by kind of use: one file of each is fetched from the hub.

`huggingface_hub` is imported lazily; the files are Parquet, read as any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hkvprof.errors import SampleError, UsageError
from hkvprof.lazy import require_extra
from hkvprof.samples.layouts.opened import Opened
from hkvprof.samples.layouts.parquet import ParquetTable
from hkvprof.samples.layouts.recognise import Reading, opened

WORD = "recommended"
DEFAULT_SAMPLES = 128
"""Samples in all, unless --max-samples says otherwise: the sets have thousands."""


@dataclass(frozen=True)
class PublicSet:
    """A dataset of the hub: its Parquet files lie in `folder`, and those that are taken are called
    `SPLIT-...`; `about` says what it shows."""

    repository: str
    folder: str
    about: str
    split: str = "train"

    @property
    def name(self) -> str:
        """What its samples' task is called."""
        return self.folder if self.folder != "data" else self.repository.rsplit("/", 1)[-1]


def _cauldron(folder: str, about: str) -> PublicSet:
    return PublicSet("HuggingFaceM4/the_cauldron", folder, about)


SETS: dict[str, tuple[PublicSet, ...]] = {
    "documents": (
        _cauldron("docvqa", "scanned pages"),
        _cauldron("infographic_vqa", "infographics"),
        _cauldron("visualmrc", "web pages"),
    ),
    "charts": (
        _cauldron("chartqa", "charts"),
        _cauldron("plotqa", "plots"),
        _cauldron("tabmwp", "tables"),
    ),
    "photos": (
        _cauldron("vqav2", "everyday photos"),
        _cauldron("aokvqa", "photos that ask for knowledge"),
        _cauldron("textvqa", "text in photos"),
    ),
    "several-images": (
        _cauldron("nlvr2", "pairs of photos"),
        _cauldron("spot_the_diff", "two views of a place"),
    ),
    "science": (
        _cauldron("ai2d", "diagrams of textbooks"),
        _cauldron("scienceqa", "questions of schools"),
    ),
    "text": (
        PublicSet("HuggingFaceH4/ultrachat_200k", "data", "chats without pictures", "train_sft"),
    ),
}
"""By kind of use. Their licences are their owners' (the datasets' pages on the hub)."""


def kinds_of(source: str) -> tuple[str, ...] | None:
    """The kinds that `recommended:KIND,...` names; None for any other source, and for a file or
    folder of that name. Raises UsageError, which lists them, where none or an unknown one is."""
    word, colon, names = source.partition(":")
    if word != WORD or Path(source).exists():
        return None
    kinds = tuple(dict.fromkeys(part.strip() for part in names.split(",") if part.strip()))
    if not colon or not kinds or any(kind not in SETS for kind in kinds):
        known = "; ".join(f"{kind} ({_told(sets)})" for kind, sets in SETS.items())
        raise UsageError(
            f"--data {source}: expected {WORD}:KIND, or several kinds separated by commas, such "
            f"as --data {WORD}:documents,photos; one file of each set is fetched from the hub. "
            f"Kinds: {known}"
        )
    return kinds


def open_recommended(kinds: Iterable[str]) -> list[Opened]:
    """The sets of these kinds, a file of each fetched where it is not in the hub's cache.

    Raises SampleError where one cannot be had, UsageError without the extra.
    """
    require_extra("pyarrow.parquet", "datasets")
    return [_opened(kind, one) for kind in kinds for one in SETS[kind]]


def _told(sets: Sequence[PublicSet]) -> str:
    return ", ".join(f"{one.name}: {one.about}" for one in sets)


def _opened(kind: str, one: PublicSet) -> Opened:
    table = ParquetTable(one.name, [_fetched(one)])
    note = f"{WORD}: {kind}: {one.repository} {one.folder} ({one.about}), {len(table):,} rows"
    return opened(table, Reading(), notes=(note,))


def _fetched(one: PublicSet) -> Path:
    """The first file of the set's split, from the hub or its cache."""
    import huggingface_hub

    where: dict[str, Any] = {
        "repo_id": one.repository,
        "repo_type": "dataset",
        "local_files_only": huggingface_hub.constants.HF_HUB_OFFLINE,
    }
    try:
        if where["local_files_only"]:
            snapshot = Path(huggingface_hub.snapshot_download(**where))
            names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*.parquet")]
        else:
            names = huggingface_hub.list_repo_files(one.repository, repo_type="dataset")
        return Path(huggingface_hub.hf_hub_download(filename=_first(names, one), **where))
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SampleError(
            f"{one.repository} ({one.folder}) cannot be had from the hub or its cache ({line}): "
            "connect, or give samples of your own with --data"
        ) from error


def _first(names: Sequence[str], one: PublicSet) -> str:
    paths = [PurePosixPath(name) for name in names]
    ours = [p for p in paths if p.suffix == ".parquet" and str(p.parent) == one.folder]
    files = sorted(str(p) for p in ours if p.name.startswith(f"{one.split}-"))
    if not files:
        raise ValueError(f"no {one.split}-*.parquet in {one.folder}")
    return files[0]
