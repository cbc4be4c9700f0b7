"""Every failure is one line with the right exit code."""

import errno
import warnings
from collections.abc import Callable

import pytest
import typer

from hkvprof.cli.errors import describe, guarded
from hkvprof.errors import BudgetError, HkvError, ModelError, ProfileError, SampleError, UsageError


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


CASES = [
    (UsageError("no"), 2, "error: no"),
    (BudgetError("small"), 2, "error: small"),
    (typer.BadParameter("odd"), 2, "error: Invalid value: odd (see `hkvprof --help`)"),
    (SampleError("a\n  b"), 1, "error: a b"),
    (ProfileError("p"), 1, "error: p"),
    (ModelError("m"), 1, "error: m"),
    (HkvError("h"), 1, "error: h"),
    (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    (typer.Abort(), 130, "interrupted; nothing was written"),
    (MemoryError(), 1, "error: out of memory: use a smaller model"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: the disk is full at x"),
    (PermissionError(errno.EACCES, "Permission denied", "y"), 1, "error: [Errno 13] Permission"),
    (ValueError("odd\nvalue"), 1, "error: unexpected ValueError: odd value (--debug shows where)"),
    (RecursionError("deep"), 1, "error: unexpected RecursionError: deep"),
]


@pytest.mark.parametrize(("error", "code", "line"), CASES, ids=lambda value: str(value)[:40])
def test_one_line_and_the_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert guarded(raising(error), debug=False) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raising(SampleError("bad")), debug=True) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad\n")


def test_cuda_out_of_memory_is_out_of_memory() -> None:
    torch = pytest.importorskip("torch")
    message, code = describe(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert message.startswith("error: out of memory")
    assert code == 1


def test_success_and_requested_exits() -> None:
    assert guarded(lambda: None, debug=False) == 0
    assert guarded(raising(typer.Exit(3)), debug=False) == 3


def test_warnings_are_one_line_and_those_for_developers_hidden(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def action() -> None:
        warnings.simplefilter("always", UserWarning)
        warnings.warn("look\n  out", UserWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("older", FutureWarning, stacklevel=1)

    assert guarded(action, debug=False) == 0
    assert capsys.readouterr().err == "warning: look out\n"
