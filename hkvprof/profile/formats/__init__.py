"""Files of head scores of other projects, a module each; every one is checked as it is read.

Against the model's grid, and for values that its maker cannot have meant.
"""

from __future__ import annotations

from hkvprof.errors import UsageError
from hkvprof.profile.exchange import Format
from hkvprof.profile.formats.duo import DUO
from hkvprof.profile.formats.lukv import LUKV
from hkvprof.profile.formats.rtp import RTP
from hkvprof.profile.formats.sparsemm import SPARSEMM

FORMATS = {one.name: one for one in (DUO, SPARSEMM, RTP, LUKV)}
"""By the name that `--format` takes."""


def find_format(name: str) -> Format:
    """The format of that name. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
