"""What a calibration loads, where it puts what it measures, and what is kept when it stops."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hkvprof.calibration.group import ALONE, ElsewhereError, Group, is_distributed
from hkvprof.cli import options
from hkvprof.cli.errors import FAILURE
from hkvprof.errors import UsageError

if TYPE_CHECKING:
    from hkvprof.calibration.recipe import Recipe
    from hkvprof.samples.read import Sample


@dataclass(frozen=True)
class Loading:
    """The model that is asked for, and how: `fsdp` spreads it over the processes of torchrun."""

    name: str
    dtype: str
    device: str | None
    device_map: str | None
    fsdp: bool

    def open(self, processes: int = 1) -> tuple[Any, Any]:
        """The model and its processor, on the device of this process: torchrun's processes take a
        GPU each, where there are any. Raises as models.load_model."""
        device = self.device
        if is_distributed() and not self.fsdp:
            from hkvprof.calibration.distributed import local_device

            device = local_device(device)
        spread = processes if self.fsdp else None
        return options.open_model(self.name, self.dtype, device, self.device_map, spread)


@dataclass(frozen=True)
class Place:
    """The profile to be made, the folder of rows (None: beside it, until it is made), the shard."""

    output: Path
    rows: Path | None
    part: tuple[int, int]

    @property
    def folder(self) -> Path:
        """The folder that rows are written to."""
        return self.rows or self.output.with_name(f"{self.output.name}.rows")

    @property
    def is_shard(self) -> bool:
        """Whether this run measures a part of the samples, and makes no profile."""
        return self.part[1] > 1

    def check(self, recipe: Recipe, force: bool) -> None:
        """Raise UsageError for an output that cannot be written, and for a recipe that asks a shard
        what is decided when shards are merged."""
        from hkvprof.cli.output import check_output

        if not self.is_shard:
            check_output(self.output, force)
        elif given := recipe.decided:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"a shard only measures: give {named} to `hkvprof merge`")

    def _share(self, samples: Sequence[Sample]) -> list[Sample]:
        return sorted(samples, key=lambda sample: sample.id)[self.part[0] - 1 :: self.part[1]]

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples of the shard that have no row."""
        from hkvprof.calibration.rows import has_row

        return [sample for sample in self._share(samples) if not has_row(self.folder, sample.id)]

    def measured(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """How many samples of the shard have a row, and how many it has."""
        count = len(self._share(samples))
        return count - len(self.left(samples)), count

    @property
    def has_index(self) -> bool:
        """Whether the index is fitted."""
        from hkvprof.calibration.rows import INDEX

        return (self.folder / INDEX).exists()

    def prepare(self, samples: Sequence[Sample], resume: bool) -> None:
        """Say what goes on, or drop what is there. Raises UsageError for an unsuitable folder."""
        from hkvprof.calibration.rows import CONDITIONS, check_rows_folder, forget, read_conditions
        from hkvprof.cli.output import say

        check_rows_folder(self.folder)
        if resume and (self.folder / CONDITIONS).exists():
            read_conditions(self.folder)
        done, count = self.measured(samples)
        if resume and done:
            say(f"continuing: {done} of {count} samples are measured in {self.folder}")
        if not resume and self.folder.exists():
            say(f"starting anew: what was measured in {self.folder} is dropped")
            forget(self.folder)

    def clear(self) -> None:
        """Remove rows that have served their purpose: those that the user gave no folder for."""
        from hkvprof.calibration.rows import forget

        if self.rows is None:
            forget(self.folder)


@contextmanager
def kept(place: Place, samples: Sequence[Sample]) -> Iterator[None]:
    """Whatever stops what is within, but for wrong usage: its message says how much is kept."""
    try:
        yield
    except BaseException as error:
        done, count = place.measured(samples)
        if done and not isinstance(error, UsageError):
            error.add_note(
                f"{done} of {count} samples are measured in {place.folder}: run again to go on"
            )
        raise


def check_kind(
    place: Place, loading: Loading, *, resume: bool, dry_run: bool, as_json: bool
) -> None:
    """Raise UsageError for options that exclude each other, or need each other."""
    several, sharded = is_distributed(), place.is_shard
    device, device_map, fsdp = loading.device, loading.device_map, loading.fsdp
    rules = (
        (device and device_map, "--device and --device-map exclude each other: give one of them"),
        (sharded and place.rows is None, "--shard needs --rows: the folder that all shards fill"),
        (sharded and not resume, "--no-resume would drop what other shards have measured: delete "
         "the folder, or give another with --rows"),
        (as_json and not dry_run, "--json goes with --dry-run: a calibration's result is a file"),
        (dry_run and several, "--dry-run is for one process: run it without torchrun"),
        (sharded and several, "--shard is for runs without torchrun, whose processes share the "
         "samples by themselves"),
        (device_map and several, "--device-map spreads a model over the devices of one process: "
         "run it without torchrun, or give --fsdp instead"),
        (device and fsdp, "--fsdp takes the GPUs, or the CPU where there are none: leave out "
         "--device"),
        (fsdp and not several, "--fsdp needs several processes: torchrun --nproc-per-node N "
         "-m hkvprof calibrate ..."),
    )  # fmt: skip
    for broken, reason in rules:
        if broken:
            raise UsageError(reason)


@contextmanager
def processes(in_step: bool = False) -> Iterator[Group]:
    """The group of this process. Only the leading process prints, and of an error only the first
    one that meets it; the others end with it, without a word."""
    if not is_distributed():
        yield ALONE
        return
    from hkvprof.calibration.distributed import together

    try:
        with together(in_step) as group:
            if group.leads:
                yield group
            else:
                with (
                    open(os.devnull, "w") as nowhere,
                    redirect_stdout(nowhere),
                    redirect_stderr(nowhere),
                ):
                    yield group
    except ElsewhereError:
        raise typer.Exit(FAILURE) from None
