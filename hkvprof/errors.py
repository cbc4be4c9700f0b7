"""Errors that users meet.

Every message says what was expected, what was found and what to do next. The command line prints
the message alone; `--debug` adds the traceback.
"""


class HkvError(Exception):
    """Base class of every error that hkvprof raises on purpose."""


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
