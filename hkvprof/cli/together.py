"""A verb in one process, or in each of those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import typer

from hkvprof.cli.errors import FAILURE
from hkvprof.profile.group import ALONE, ElsewhereError, Group, is_distributed


@contextmanager
def processes(in_step: bool = False) -> Iterator[Group]:
    """The group of this process. Only the leading process prints, and of an error only the first
    one that meets it; the others end with it, without a word."""
    if not is_distributed():
        yield ALONE
        return
    from hkvprof.profile.distributed import together

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


def own_device(wanted: str | None, fsdp: bool) -> str | None:
    """The device of this process: torchrun's processes take a GPU each, where there are any."""
    if not is_distributed() or fsdp:
        return wanted
    from hkvprof.profile.distributed import local_device

    return local_device(wanted)
