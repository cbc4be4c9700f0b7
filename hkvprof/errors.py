"""Errors that users meet.

Every message says what was expected, what was found and what to do next. The command line prints
the message alone; `--debug` adds the traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

_MOST, _END = 2000, 500
"""Characters of a message, and how many of them are its last ones, which say what to do."""


def printable(text: str) -> str:
    """What a terminal may be shown: control characters escaped, megabytes cut in the middle.

    Messages quote what strangers wrote into files.
    """
    if len(text) > _MOST:
        text = f"{text[: _MOST - _END]} [...] {text[-_END:]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, OSError | RuntimeError) and (
        "can't allocate memory" in text or "Cannot allocate memory" in text
    )


def refuse_unknown(
    what: str, given: Iterable[str], known: Iterable[str], removed: Mapping[str, str]
) -> None:
    """Raise UsageError unless every name in `given` is `known`; `removed` says what to do instead.

    `what` is the record or function that takes the names.
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            advice = removed.get(name, f"there are {', '.join(names)}")
            raise UsageError(f"{what} has no option {name!r}: {advice}")


class HkvError(Exception):
    """Base class of every error that hkvprof raises on purpose."""

    def __str__(self) -> str:
        """The message, safe to print."""
        return printable(super().__str__())


class UsageError(HkvError):
    """The call itself is wrong: a bad option, a file that would be overwritten (exit code 2)."""


class SampleError(HkvError):
    """A calibration or evaluation sample cannot be read."""


class ProfileError(HkvError):
    """A profile file is damaged, too new, or does not describe this model."""


class ModelError(HkvError):
    """A model cannot be loaded or has a feature that hkvprof refuses."""


class BudgetError(UsageError):
    """A budget cannot be parsed or is too small for what must be kept."""


class HkvWarning(UserWarning):
    """Something that works, but perhaps not as well as measured."""


class CompressionError(HkvError):
    """The runtime could not do what it promised: a covered layer was not compressed."""


def counted(count: int, noun: str) -> str:
    """`1 sample`, `2,048 samples`: the one rule for numbers before nouns."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
