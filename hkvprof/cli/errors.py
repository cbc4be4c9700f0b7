"""From exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from hkvprof.calibration.group import is_follower
from hkvprof.calibration.recipe import REMOVED
from hkvprof.errors import HkvError, UsageError, out_of_memory, printable

FAILURE, USAGE, INTERRUPTED = 1, 2, 130

_ClickError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""Click's own base class; recent versions of typer carry their own copy of click."""


def guarded(action: Callable[[], Any], debug: bool) -> int:
    """Run `action`; print what went wrong as one line (after a traceback with `debug`).

    Returns the exit code: 0, 1 for failures, 2 for wrong usage, 130 after Ctrl-C.
    """
    try:
        with _short_warnings(debug):
            action()
            sys.stdout.flush()
    except typer.Exit as request:
        return int(request.exit_code)
    except BrokenPipeError:
        _discard_stdout()
        return FAILURE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = describe(error)
        if isinstance(error, _ClickError) and is_follower():
            return code  # all processes have the same command line: one says what is wrong with it
        print(message, *(f"({note})" for note in notes(error)), file=sys.stderr)
        return code
    return 0


def describe(error: BaseException) -> tuple[str, int]:
    """The line to print and the exit code for an exception."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted" if notes(error) else "interrupted; nothing was written", INTERRUPTED
    if isinstance(error, UsageError):
        return f"error: {one_line(error)}", USAGE
    if isinstance(error, HkvError):
        return f"error: {one_line(error)}", FAILURE
    if isinstance(error, _ClickError):
        return f"error: {_click_message(error)}", USAGE
    if out_of_memory(error):
        return (
            "error: out of memory: use a smaller model or --dtype bfloat16, spread the model with "
            "--device-map auto, or take shorter samples",
            FAILURE,
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" at {error.filename}" if error.filename else ""
        return f"error: the disk is full{where}: free some space and run again", FAILURE
    if isinstance(error, OSError):
        return f"error: {one_line(error)}", FAILURE
    kind = type(error).__name__
    return f"error: unexpected {kind}: {one_line(error)} (--debug shows where)", FAILURE


def notes(error: BaseException) -> list[str]:
    """What hkvprof added to an exception as it passed: where it happened, what is kept on disk."""
    return list(getattr(error, "__notes__", ()))


def _discard_stdout() -> None:
    """Nobody reads on: send what is still buffered nowhere, so that exit does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: BaseException) -> str:
    """The message without line breaks, safe to print."""
    return printable(" ".join(str(error).split()))


_REMOVED = {f"--{name.replace('_', '-')}": advice for name, advice in REMOVED.items()}
_REMOVED["--no-conservative"] = _REMOVED["--conservative"]


def _click_message(error: Any) -> str:
    if (removed := getattr(error, "option_name", None)) in _REMOVED:
        return f"{removed} is gone: {_REMOVED[removed]}"
    hint = getattr(getattr(error, "ctx", None), "command_path", "hkvprof")
    return f"{' '.join(error.format_message().split())} (see `{hint} --help`)"


@contextmanager
def _short_warnings(debug: bool) -> Iterator[None]:
    """Warnings as one line each; those for developers only with `debug`."""
    with warnings.catch_warnings():
        if not debug:
            for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            warnings.showwarning = _print_warning
        yield


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
