"""The doctor's long prompt is as long as on a slow machine, not as the clock says."""

from __future__ import annotations

import pytest

from hkvprof.doctor import exact


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the usual prompt: the least."""
    monkeypatch.setattr(exact, "_SECONDS", 0.0)
