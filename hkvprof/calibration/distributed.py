"""A group of processes as torchrun starts them.

Each process measures a share of the samples, or, where the model itself is spread over all of them
(FSDP), all samples in step. What they tell each other goes through gloo, on the host. A process
that fails says so where the others look between samples; waiting ones see its connection end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hkvprof.calibration.group import (
    ALONE,
    SET_BY_TORCHRUN,
    ElsewhereError,
    Group,
    LostError,
    is_distributed,
)
from hkvprof.errors import HkvError, UsageError

T = TypeVar("T")

_JOIN = timedelta(minutes=5)
_WAIT = timedelta(days=7)
"""Shares may take very different times. It is no way to notice failures: those end connections."""
_FAILED = "hkvprof/failed"


class _Torchrun(Group):
    def __init__(self, rank: int, size: int, store: Any, in_step: bool) -> None:
        self.rank, self.size, self.in_step = rank, size, in_step
        self._store = store
        self._gloo = dist.new_group(backend="gloo", timeout=_WAIT)

    def check(self) -> None:
        try:
            failed = self._store.check([_FAILED])
        except RuntimeError as error:
            raise _lost() from error
        if failed:
            raise ElsewhereError("another process failed")

    def from_leader(self, make: Callable[[], T]) -> T:
        box: list[Any] = [make() if self.leads else None]
        with _connected():
            dist.broadcast_object_list(box, src=0, group=self._gloo)
        made: T = box[0]
        return made

    def collect(self, value: T) -> list[T]:
        gathered: list[Any] | None = [None] * self.size if self.leads else None
        with _connected():
            dist.gather_object(value, gathered, dst=0, group=self._gloo)
        return gathered or []

    def is_first_to_fail(self) -> bool:
        """Tell the others; False where one of them has failed before."""
        try:
            return bool(self._store.add(_FAILED, 1) == 1)
        except RuntimeError:  # nobody can be asked: better two messages than none
            return True


@contextmanager
def together(in_step: bool = False) -> Iterator[Group]:
    """The group of this process, for the time within; joining waits for all of its processes.

    An exception within ends all processes: the first one raises it, with a note that says which
    process it was; the others raise ElsewhereError. Raises HkvError when the processes do not meet.
    """
    if not is_distributed():
        yield ALONE
        return
    group = _join(in_step)
    try:
        yield group
    except BaseException as error:
        if not group.is_first_to_fail():
            raise ElsewhereError("another process failed") from error
        error.add_note(f"rank {group.rank} of {group.size}")
        raise
    finally:
        dist.destroy_process_group()


def local_device(wanted: str | None) -> str | None:
    """The device of this process: its own GPU, where there are any and `wanted` does not say cpu.

    Raises UsageError for one device named for all, and for more processes than GPUs.
    """
    if not is_distributed() or wanted == "cpu":
        return wanted
    if wanted not in (None, "cuda"):
        raise UsageError(
            f"--device {wanted} would be one device for all processes: expected cpu or cuda, or "
            "nothing for a GPU each"
        )
    number, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if devices == 0:
        return wanted
    if number >= devices:
        raise UsageError(
            f"more processes than GPUs: expected --nproc-per-node {devices}, or --device cpu"
        )
    return f"cuda:{number}"


def _join(in_step: bool) -> _Torchrun:
    backend = "cpu:gloo,cuda:nccl" if in_step and torch.cuda.is_available() else "gloo"
    if backend != "gloo":
        torch.cuda.set_device(local_device(None))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_JOIN))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_WAIT)
        return _Torchrun(rank, size, store, in_step)
    except (RuntimeError, ValueError) as error:
        names = ", ".join(f"{name}={os.environ[name]}" for name in SET_BY_TORCHRUN)
        raise HkvError(
            f"the processes of torchrun did not meet ({names}): "
            f"{str(error).splitlines()[0]}. Without torchrun, unset RANK and WORLD_SIZE"
        ) from error


@contextmanager
def _connected() -> Iterator[None]:
    """gloo raises RuntimeError where another process's end closed the connection."""
    try:
        yield
    except RuntimeError as error:
        raise _lost() from error


def _lost() -> LostError:
    return LostError(
        "the connection to another process was lost: it was killed, or the network failed. What is "
        "measured is kept: run the same command again"
    )
